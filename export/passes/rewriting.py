"""Reading and replacing nodes, for the rewrites beside this file."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

# The name that an initializer would have, had it been free.
_WANTED = "wanted name"
# Constants of so few elements hold sizes and factors, not weights.
_SMALL = 16


def nodes(model: ir.Model, *op_types: str) -> Iterator[ir.Node]:
    """Nodes of the main graph with one of the ONNX `op_types`.

    The list is taken first, so nodes may be replaced on the way.
    """
    for node in list(model.graph):
        wanted = node.domain == "" and node.op_type in op_types
        if wanted and node.graph is not None:
            yield node


def array(value: ir.Value | None) -> np.ndarray | None:
    """The content of a constant, or `None` for anything computed."""
    if value is None or value.const_value is None:
        return None
    if value.is_graph_input():
        return None
    return value.const_value.numpy()


def content(value: ir.Value | None) -> np.ndarray:
    """The content of a value that is known to be constant."""
    found = array(value)
    if found is None:
        raise TypeError(f"A constant was expected. Received: {value}")
    return found


def scalar(value: ir.Value | None) -> float | None:
    """The content of a constant with one element."""
    found = array(value)
    return None if found is None or found.size != 1 else found.item()


def constant(model: ir.Model, name: str, data: np.ndarray) -> ir.Value:
    """A new initializer, with a number behind its name while it is taken.

    `clean` gives it the name itself once what it replaces is gone.
    """
    graph = model.graph
    taken = graph.initializers
    unique, number = name, 1
    while unique in taken:
        number += 1
        unique = f"{name}_{number}"
    tensor = ir.tensor(np.ascontiguousarray(data), name=unique)
    value = ir.val(
        unique, dtype=tensor.dtype, shape=tensor.shape, const_value=tensor
    )
    replaced = taken.get(name)
    value.meta[_WANTED] = replaced.meta.get(_WANTED, name) if replaced else name
    graph.register_initializer(value)
    return value


def before(
    node: ir.Node,
    op_type: str,
    inputs: list[ir.Value],
    num_outputs: int = 1,
    domain: str = "",
    **attributes: Any,
) -> Any:
    """Adds a node ahead of `node`; returns its output or outputs."""
    new = ir.node(
        op_type,
        inputs,
        attributes,
        num_outputs=num_outputs,
        domain=domain,
    )
    node.graph.insert_before(node, new)
    return new.outputs[0] if num_outputs == 1 else new.outputs


def replace(old: ir.Value, new: ir.Value) -> None:
    """Gives all users of `old` the value `new`, which takes its name."""
    producer = old.producer()
    new.shape = new.shape or old.shape
    new.type = new.type or old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name, old.name = old.name, None
    if producer is not None and producer.graph is not None:
        producer.graph.remove(producer, safe=True)


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that computes `value`, if it is one of this operator."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def operands(
    value: ir.Value | None, op_type: str
) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Both orders of the operands `value` is computed from by `op_type`."""
    node = made_by(value, op_type)
    if node is not None:
        yield from (tuple(node.inputs), tuple(node.inputs[::-1]))


def only_user(value: ir.Value) -> ir.Node | None:
    """The node that reads `value`, if just one does and no output shows it."""
    uses = value.consumers()
    if len(uses) != 1 or value.is_graph_output():
        return None
    return uses[0]


def other_input(node: ir.Node, value: ir.Value) -> ir.Value:
    """The second operand of a node with two."""
    first, second = node.inputs
    return second if first is value else first


def string(node: ir.Node, name: str, default: str = "") -> str:
    """A string attribute."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_string()


def integer(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def drop_unused(model: ir.Model) -> None:
    """Drops what no output depends on."""
    import onnx_ir.passes.common as common

    common.RemoveUnusedNodesPass()(model)


def share_equal(model: ir.Model) -> None:
    """Computes once what several nodes compute alike."""
    import onnx_ir.passes.common as common

    common.DeduplicateInitializersPass(size_limit=_SMALL)(model)
    common.CommonSubexpressionEliminationPass()(model)


def clean(model: ir.Model) -> None:
    """Drops what no output depends on, and what only a tracer wanted.

    Shapes of inner values go too: a runtime infers its own, and believes
    stored ones even where a rewrite left an axis open on purpose.
    """
    import onnx_ir.passes.common as common

    drop_unused(model)
    common.ClearMetadataAndDocStringPass()(model)
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
    for value in list(graph.initializers.values()):
        wanted = value.meta.get(_WANTED)
        if wanted and wanted not in graph.initializers:
            value.name = wanted
    for node in graph:
        node.name = ""
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None
