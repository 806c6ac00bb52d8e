"""Gives a traced graph the names of the Keras model."""

from collections.abc import Sequence

import onnx_ir as ir

from keras_peft.export.result import TensorSpec
from keras_peft.export.signature import Signature


def name_interface(
    model: ir.Model, signature: Signature, outputs: Sequence[str]
) -> None:
    """Renames inputs, outputs and axes, and sorts inputs as in Keras.

    Args:
        model: A traced graph whose inputs are called `input_<position>`.
        signature: The inputs of the Keras model.
        outputs: Names of the outputs, in the order of the graph.
    """
    graph = model.graph
    position = {
        value: int(value.name.removeprefix("input_").split(":")[0])
        for value in graph.inputs
    }
    ordered = sorted(graph.inputs, key=position.__getitem__)
    graph.inputs[:] = ordered
    axes: dict[str, str] = {}
    _clear_names(model, [i.name for i in signature.inputs], outputs)
    for value in ordered:
        spec = signature.inputs[position[value]]
        for old, new in zip(value.shape or (), spec.shape, strict=True):
            if isinstance(new, str) and not isinstance(old, int):
                axes[str(getattr(old, "value", old))] = new
        value.name = spec.name
        value.shape = ir.Shape(spec.shape)
    for number, (value, name) in enumerate(
        zip(list(graph.outputs), outputs, strict=True)
    ):
        if value.is_graph_input() or value in graph.outputs[:number]:
            value = _copied(graph, value, number)
        value.name = name
        value.shape = _renamed(value.shape, axes)


def _clear_names(
    model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]
) -> None:
    """Frees names of the interface that inner values happen to have."""
    wanted = {*inputs, *outputs}
    values = [v for node in model.graph for v in node.outputs]
    for value in values + list(model.graph.initializers.values()):
        if value.name in wanted:
            value.name = f"inner_{value.name}"


def _copied(graph: ir.Graph, value: ir.Value, position: int) -> ir.Value:
    node = ir.node("Identity", [value])
    graph.append(node)
    graph.outputs[position] = node.outputs[0]
    node.outputs[0].type = value.type
    node.outputs[0].shape = value.shape
    return node.outputs[0]


def _renamed(shape: ir.Shape | None, axes: dict[str, str]) -> ir.Shape | None:
    """A shape with the axes that come from inputs called as there.

    Any other free axis, such as a pooled length, stays without a name.
    """
    if shape is None:
        return None
    named = []
    for number, size in enumerate(shape):
        symbol = str(getattr(size, "value", size))
        name = "batch" if number == 0 else axes.get(symbol)
        named.append(size if isinstance(size, int) else name)
    return ir.Shape(named)


def specs(values: Sequence[ir.Value]) -> tuple[TensorSpec, ...]:
    """Inputs or outputs of a graph, as a user reads them."""
    return tuple(
        TensorSpec(
            value.name,
            value.dtype.numpy().name,
            tuple(
                size if isinstance(size, int) else size.value or "any"
                for size in value.shape or ()
            ),
        )
        for value in values
    )
