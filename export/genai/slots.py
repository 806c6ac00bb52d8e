"""Places of a graph that adapters fill at run time.

Each is an input with a default that changes nothing: a matrix of rank 0, or
the row of a token that no text has. ONNX Runtime takes others from an adapter
file, for each run anew.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from keras_peft.export.genai.decoder import Linear

if TYPE_CHECKING:
    from keras_peft.export.genai.writer import Writer

# Where the model file says which layers a place is of.
METADATA = "keras_peft.slots"
A, B = "lora_a", "lora_b"


@dataclasses.dataclass(frozen=True)
class Slots:
    """What adapters may change.

    Attributes:
        low_rank: Whether linear layers have a place for a change of their
            kernels.
        tokens: The most virtual tokens that an adapter puts before a text.
            Their ids follow those of the vocabulary.
        prefixes: Whether those have keys and values of their own.
    """

    low_rank: bool = False
    tokens: int = 0
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


def metadata(writer: "Writer") -> dict[str, str]:
    """What a model file says of its places."""
    return {METADATA: json.dumps(writer.adaptable)}


def common_name(parts: Sequence[Linear]) -> str:
    """`block.attention.query+key+value`."""
    first, *rest = [part.key for part in parts]
    return "+".join([first, *(_last(key) for key in rest)])


def _last(key: str) -> str:
    return key.rpartition(":")[2] if ":" in key else key.rpartition(".")[2]
