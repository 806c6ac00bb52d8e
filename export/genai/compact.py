"""A traced graph in fewer bytes."""

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from keras_peft.export.blockwise import Blockwise
from keras_peft.export.blockwise import quantize as round_to_nearest
from keras_peft.export.genai.linear import product_attributes
from keras_peft.export.genai.plan import BITS
from keras_peft.export.genai.plan import LAYER_BLOCKS
from keras_peft.export.genai.plan import TABLE_BITS
from keras_peft.export.genai.plan import TABLE_BLOCK
from keras_peft.export.genai.writer import MICROSOFT
from keras_peft.export.passes import rewriting
from keras_peft.export.quantize import quantize_int8


def store(
    model: ir.Model, quantize: str, trained: Iterable[Blockwise] = ()
) -> None:
    """Stores the matrices of a graph as `to_genai` is asked to, in place.

    Args:
        model: A float32 graph.
        quantize: `"float16"`, `"int8"` or `"int4"`.
        trained: Kernels of which the integers were chosen in training.
    """
    if quantize == "float16":
        _in_float16(model)
        return
    _in_blocks(model, BITS[quantize], list(trained))
    # Tables, a head that is one, and what is multiplied with otherwise.
    quantize_int8(model)


def _in_float16(model: ir.Model) -> None:
    """Computes in float32 what is stored in half the bytes."""
    first = model.graph[0]
    for value, array in _matrices(model):
        half = rewriting.constant(
            model, f"{value.name}/half", array.astype("float16")
        )
        wide = rewriting.before(first, "Cast", [half], to=ir.DataType.FLOAT)
        value.replace_all_uses_with(wide)
    rewriting.clean(model)


def _matrices(model: ir.Model) -> list[tuple[ir.Value, np.ndarray]]:
    found = [
        (value, rewriting.array(value))
        for value in list(model.graph.initializers.values())
    ]
    return [
        (value, array)
        for value, array in found
        if array is not None
        and array.dtype == np.float32
        and sum(size > 1 for size in array.shape) > 1
    ]


def _in_blocks(model: ir.Model, bits: int, trained: list[Blockwise]) -> None:
    """Has kernels multiplied as they are stored, in blocks of integers."""
    made: dict[ir.Value, tuple[Blockwise, list[ir.Value]]] = {}
    open_ones = {kernel.kernel().tobytes(): kernel for kernel in trained}
    for node in rewriting.nodes(model, "MatMul"):
        kernel = node.inputs[1]
        array = rewriting.array(kernel)
        if array is None or array.ndim != 2 or array.dtype != np.float32:
            continue
        if kernel not in made:
            stored = open_ones.pop(np.ascontiguousarray(array).tobytes(), None)
            stored = stored or _rounded(array, bits, _is_head(node))
            made[kernel] = stored, _constants(model, kernel.name, stored)
        rewriting.replace(node.outputs[0], _product(node, *made[kernel]))
    if open_ones:
        raise ValueError(
            "Layers trained with integers that a traced graph has no place "
            "for: it would round them anew. Store the model without "
            f"`quantize`. Received: {len(open_ones)} such layers"
        )
    model.opset_imports[MICROSOFT] = 1


def _rounded(array: np.ndarray, bits: int, is_head: bool) -> Blockwise:
    if is_head:
        return round_to_nearest(array, TABLE_BITS, TABLE_BLOCK)
    return round_to_nearest(array, bits, LAYER_BLOCKS[bits])


def _is_head(node: ir.Node) -> bool:
    """Whether a product is the logits, or they are made of it elementwise."""
    value = node.outputs[0]
    while not value.is_graph_output():
        user = rewriting.only_user(value)
        if user is None or user.op_type not in ("Add", "Div", "Mul", "Tanh"):
            return False
        value = user.outputs[0]
    return bool(value.name == "logits")


def _constants(model: ir.Model, name: str, stored: Blockwise) -> list[ir.Value]:
    return [
        rewriting.constant(model, f"{name}/{part}", array)
        for part, array in stored.tensors().items()
    ]


def _product(
    node: ir.Node, stored: Blockwise, constants: list[ir.Value]
) -> ir.Value:
    made: ir.Value = rewriting.before(
        node,
        "MatMulNBits",
        [node.inputs[0], *constants],
        domain=MICROSOFT,
        **product_attributes(stored),
    )
    return made
