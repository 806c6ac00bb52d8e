"""Places of a graph that adapters fill at run time.

Each is an input with a default that changes nothing: a matrix of rank 0, or
the row of a token that no text has. ONNX Runtime takes others from an adapter
file, for each run anew.
"""

import dataclasses
import json
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.decoder import Linear
from keras_peft.export.genai.decoder import parts as parts_of

if TYPE_CHECKING:
    from keras_peft.export.genai.writer import Writer

# Where a model file says which layers a place is of, and whose adapters fit.
LAYERS, BASE = "keras_peft.slots", "keras_peft.base"
A, B = "lora_a", "lora_b"
_SAMPLES = 16


@dataclasses.dataclass(frozen=True)
class Slots:
    """What adapters may change.

    Attributes:
        low_rank: Whether linear layers have a place for a change of their
            kernels.
        prompts: Whether the first tokens may be embedded as an adapter says.
        prefixes: Whether their keys and values may be an adapter's.
    """

    low_rank: bool = False
    prompts: bool = False
    prefixes: bool = False


def low_rank(
    writer: "Writer", x: ir.Value, outputs: ir.Value, parts: Sequence[Linear]
) -> ir.Value:
    """`outputs + x @ A @ B`, of rank 0 by default."""
    name = common_name(parts)
    inputs = parts[0].kernel.shape[0]
    width = sum(part.kernel.shape[1] for part in parts)
    rank = f"{name}.rank"
    a = writer.default(f"{name}.{A}", np.zeros((inputs, 0)), (inputs, rank))
    b = writer.default(f"{name}.{B}", np.zeros((0, width)), (rank, width))
    writer.adaptable[name] = [part.key for part in parts]
    change = writer.op("MatMul", writer.op("MatMul", x, a), b)
    return writer.op("Add", outputs, change)


def metadata(writer: "Writer", decoder: Decoder) -> dict[str, str]:
    """What a model file says of its places."""
    if not writer.defaults:
        return {}
    return {LAYERS: json.dumps(writer.adaptable), BASE: str(base_id(decoder))}


def layers_of(model: ir.Model) -> dict[str, list[str]]:
    """The layers at each place of a graph, by their keys."""
    found: dict[str, list[str]] = json.loads(model.metadata_props[LAYERS])
    return found


def base_id(decoder: Decoder) -> int:
    """A number that tells one base from another, however it is stored."""
    arrays = [decoder.table.rows]
    arrays += [part.kernel for part in parts_of(decoder, Linear)]
    found = 0
    for array in arrays:
        # Evenly spaced numbers: another checkpoint differs in most.
        index = np.linspace(0, array.size - 1, _SAMPLES).astype(int)
        found = zlib.crc32(array.flat[index].tobytes(), found)
    return found & 0x7FFFFFFF  # The file has room for an int32.


def common_name(parts: Sequence[Linear]) -> str:
    """`block.attention.query+key+value`."""
    first, *rest = [part.key for part in parts]
    return "+".join([first, *(_last(key) for key in rest)])


def _last(key: str) -> str:
    return key.rpartition(":")[2] if ":" in key else key.rpartition(".")[2]
