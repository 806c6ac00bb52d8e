"""One copy of every constant."""

import hashlib

import numpy as np
import onnx_ir as ir

from keras_peft.export.passes import rewriting


def apply(model: ir.Model) -> int:
    """Points users of equal initializers at one of them; counts the rest.

    A large matrix that is stored once more transposed, as the table of a
    tied output is, becomes a Transpose of the first, which a runtime
    computes when it loads the file.
    """
    first: dict[tuple[object, ...], ir.Value] = {}
    count = 0
    graph = model.graph
    # A table that rows are read from stays as it is; copies follow it.
    values = sorted(graph.initializers.values(), key=_is_computed_with)
    for value in values:
        content = rewriting.array(value)
        if content is None or value.is_graph_output():
            continue
        key = _key(content)
        if key not in first:
            transposed = _key(content.T) if _is_large(content) else None
            if transposed not in first:
                first[key] = value
                continue
            source = _transpose(graph, first[transposed])
        else:
            source = first[key]
        value.replace_all_uses_with(source)
        del graph.initializers[value.name]
        count += 1
    return count


def _is_computed_with(value: ir.Value) -> bool:
    return all(node.op_type != "Gather" for node in value.consumers())


def _key(content: np.ndarray) -> tuple[object, ...]:
    data = np.ascontiguousarray(content).tobytes()
    digest = hashlib.sha256(data).hexdigest()
    return content.dtype.name, content.shape, digest


def _is_large(content: np.ndarray) -> bool:
    return content.ndim == 2 and min(content.shape) > 1 and content.size > 4096


def _transpose(graph: ir.Graph, value: ir.Value) -> ir.Value:
    node = ir.node("Transpose", [value], {"perm": [1, 0]})
    graph.insert_before(graph[0], node)
    return node.outputs[0]
