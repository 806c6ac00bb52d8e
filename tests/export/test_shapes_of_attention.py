"""Detours of a tracer through shapes become single steps."""

import graphs
import numpy as np
import onnx_ir as ir

from keras_peft.export.passes import constant_shapes
from keras_peft.export.passes import half_turn
from keras_peft.export.passes import key_transpose
from keras_peft.export.passes import rewriting

KEY = """g (float[a, 4, b, 16] x) => (float[a, 4, 16, b] y) {
    shape = Shape(x)
    last = Slice(shape, minus_1, infinite)
    length = Slice(shape, minus_2, minus_1)
    outer = Slice(shape, minus_infinite, minus_2)
    flat_shape = Concat <axis = 0> (minus_1, length, last)
    flat = Reshape(x, flat_shape)
    turned = Transpose <perm = [PERM]> (flat)
    split_shape = Concat <axis = 0> (outer, last, length)
    y = Reshape(turned, split_shape)
}"""
HALVES = """g (float[a, b, 4, 8] x) => (float[a, b, 4, 16] y) {
    minus = Neg(x)
    first = Unsqueeze(minus, axis)
    second = Unsqueeze(x, axis)
    stack = Concat <axis = -2> (first, second)
    shape_of_x = Shape <start = 0, end = 3> (x)
    shape = Concat <axis = 0> (shape_of_x, width)
    y = Reshape(stack, shape)
}"""


def key(perm="0, 2, 1"):
    return graphs.graph(
        KEY.replace("PERM", perm),
        minus_1=np.array([-1]),
        minus_2=np.array([-2]),
        infinite=np.array([2**63 - 1]),
        minus_infinite=np.array([-(2**63)]),
    )


def halves():
    model = graphs.graph(HALVES, axis=np.array([-2]), width=np.array([16]))
    minus = next(n for n in model.graph if n.op_type == "Neg").outputs[0]
    minus.shape = model.graph.inputs[0].shape
    return model


def test_a_flattened_key_is_transposed_in_one_step():
    model = key()
    x = graphs.random(2, 4, 5, 16)
    want = graphs.run(model, x=x)
    assert key_transpose.apply(model) == 1
    rewriting.drop_unused(model)
    assert graphs.ops(model) == {"Transpose": 1}
    np.testing.assert_array_equal(graphs.run(model, x=x), want)


def test_another_order_of_axes_is_left_alone():
    assert key_transpose.apply(key("1, 0, 2")) == 0


def test_halves_are_joined_in_one_step():
    model = halves()
    x = graphs.random(2, 3, 4, 8)
    want = graphs.run(model, x=x)
    assert half_turn.apply(model) == 1
    rewriting.drop_unused(model)
    assert graphs.ops(model) == {"Neg": 1, "Concat": 1}
    np.testing.assert_array_equal(graphs.run(model, x=x), want)


def test_a_reshape_that_does_more_than_join_is_left_alone():
    model = halves()
    model.graph.outputs[0].shape = ir.Shape(["a", "b", 8, 8])
    assert half_turn.apply(model) == 0


def reshaped(shape):
    model = graphs.graph(
        """g (float[a, b, 8] x, int64[4] shape) => (float[a, b, 2, 4] y) {
            y = Reshape(x, shape)
        }"""
    )
    model.graph.outputs[0].shape = ir.Shape(shape)
    return model


def test_a_shape_that_is_known_is_a_constant():
    model = reshaped(["a", "b", 2, 4])
    assert constant_shapes.apply(model) == 1
    (shape,) = model.graph.initializers.values()
    assert rewriting.content(shape).tolist() == [0, 0, 2, 4]


def test_two_axes_that_move_keep_the_computed_shape():
    assert constant_shapes.apply(reshaped(["b", "a", 2, 4])) == 0
