"""Even channels for kernels that will read 8-bit inputs.

A normalization leaves a few channels many times as large as the rest. One
range for all of them spends its 256 steps on the few. Dividing each channel
by a factor, and multiplying the kernel's row by it, changes no product and
makes the channels alike (SmoothQuant, https://arxiv.org/abs/2211.10438).
"""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from keras_peft.export import comparison
from keras_peft.export.passes import rewriting
from keras_peft.export.samples import Batch

if TYPE_CHECKING:
    import onnx

# The share of the unevenness that kernels take over. They have a scale per
# column, so they bear more than half.
_SHARE = 0.6


def channel_ranges(
    graph: "onnx.ModelProto", batches: Sequence[Batch]
) -> dict[str, np.ndarray]:
    """Largest magnitude of every channel that leaves a normalization.

    Args:
        graph: A float32 graph.
        batches: Inputs to run it on. A normalization's channels differ by
            its weights more than by the data, so made-up inputs will do.
    """
    import onnx

    names = sorted(x.name for x in _kernels_by_input(ir.from_proto(graph)))
    if not names:
        return {}
    probed = onnx.ModelProto()
    probed.CopyFrom(graph)
    del probed.graph.output[:]
    probed.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    runs = comparison.run_graph(probed, batches)
    return {
        name: np.max([_largest(run[n]) for run in runs], axis=0)
        for n, name in enumerate(names)
    }


def smooth(model: ir.Model, ranges: Mapping[str, np.ndarray]) -> int:
    """Moves unevenness from inputs into kernels, in place; counts inputs."""
    groups = _kernels_by_input(model)
    for inputs, nodes in groups.items():
        factor = _factor(ranges[inputs.name], nodes)
        stored = rewriting.constant(model, f"{inputs.name}/factor", factor)
        cast = rewriting.before(
            model.graph[0], "Cast", [stored], to=ir.DataType.FLOAT
        )
        even = rewriting.before(nodes[0], "Mul", [inputs, cast])
        rows = 1 / factor.astype("float32")[:, None]
        for node in nodes:
            kernel = node.inputs[1]
            scaled = rewriting.content(kernel) * rows
            node.replace_input_with(0, even)
            node.replace_input_with(
                1, rewriting.constant(model, kernel.name, scaled)
            )
    rewriting.clean(model)
    return len(groups)


def _factor(largest: np.ndarray, nodes: Sequence[ir.Node]) -> np.ndarray:
    """What every channel is multiplied by, in half the bytes.

    Rounded before kernels are divided by it, so that the product stays.
    """
    kernels = [rewriting.content(node.inputs[1]) for node in nodes]
    rows = np.abs(np.concatenate(kernels, axis=1)).max(axis=1)
    floor = np.float32(1e-5)
    factor = np.maximum(rows, floor) ** (1 - _SHARE)
    factor /= np.maximum(largest, floor) ** _SHARE
    factor /= np.exp(np.log(factor).mean())
    return np.clip(factor, 2.0**-10, 2.0**10).astype("float16")


def _largest(values: np.ndarray) -> np.ndarray:
    return np.abs(values).reshape(-1, values.shape[-1]).max(axis=0)


def _kernels_by_input(model: ir.Model) -> dict[ir.Value, list[ir.Node]]:
    """Products with a kernel of their own, by the normalized input."""
    groups: dict[ir.Value, list[ir.Node]] = {}
    for node in rewriting.nodes(model, "MatMul"):
        kernel = rewriting.array(node.inputs[1])
        if kernel is None or kernel.ndim != 2:
            continue
        if len(node.inputs[1].uses()) == 1 and _is_normalized(node.inputs[0]):
            groups.setdefault(node.inputs[0], []).append(node)
    return groups


def _is_normalized(value: ir.Value | None) -> bool:
    """A LayerNormalization, or `x * gamma` with or without `+ beta`."""
    node = None if value is None else value.producer()
    if node is None:
        return False
    if node.op_type == "LayerNormalization":
        return True
    if node.op_type not in ("Mul", "Add"):
        return False
    for vector, other in (node.inputs, node.inputs[::-1]):
        weights = rewriting.array(vector)
        if weights is not None and weights.ndim == 1 and weights.size > 1:
            return node.op_type == "Mul" or _is_normalized(other)
    return False
