import graphs
import numpy as np

from keras_peft.export.passes import deduplicate_initializers
from keras_peft.export.passes import name_initializers

TWO = """g (float[a, 80] x) => (float[a, 80] y) {
    z = MatMul(x, first)
    y = MatMul(z, second)
}"""


def test_equal_constants_are_stored_once():
    kernel = graphs.random(80, 80)
    model = graphs.graph(TWO, first=kernel, second=kernel.copy())
    x = graphs.random(2, 80, seed=1)
    want = graphs.run(model, x=x)
    assert deduplicate_initializers.apply(model) == 1
    assert len(model.graph.initializers) == 1
    np.testing.assert_array_equal(graphs.run(model, x=x), want)


def test_a_transposed_copy_is_computed_on_loading():
    kernel = graphs.random(80, 80)
    model = graphs.graph(TWO, first=kernel, second=kernel.T.copy())
    x = graphs.random(2, 80, seed=1)
    want = graphs.run(model, x=x)
    assert deduplicate_initializers.apply(model) == 1
    assert graphs.ops(model)["Transpose"] == 1
    np.testing.assert_array_equal(graphs.run(model, x=x), want)


def test_different_constants_both_stay():
    first, second = graphs.random(80, 80), graphs.random(80, 80, seed=1)
    model = graphs.graph(TWO, first=first, second=second)
    assert deduplicate_initializers.apply(model) == 0
    assert len(model.graph.initializers) == 2


def test_initializers_carry_the_paths_of_variables():
    first, second = graphs.random(80, 80), graphs.random(80, 80, seed=1)
    model = graphs.graph(TWO, first=first, second=second)
    variables = {"block/query/kernel": first, "block/key/kernel": second.T}
    assert name_initializers.apply(model, variables) == 2
    assert set(model.graph.initializers) == set(variables)


def test_an_unknown_constant_is_called_by_its_role():
    model = graphs.graph(
        """g (float[a, b] x) => (float[c, 5] y) {
            z = Reshape(x, val_7)
            y = Mul(z, lifted_tensor_3)
        }""",
        val_7=np.array([-1, 5]),
        lifted_tensor_3=graphs.random(5),
    )
    assert name_initializers.apply(model, {"other": graphs.random(6)}) == 0
    assert set(model.graph.initializers) == {"shape", "constant"}


def test_no_name_is_given_twice():
    model = graphs.graph(
        """g (float[a, 5] shape) => (float[c, 5] y) {
            constant = Reshape(shape, constant_2)
            y = Mul(constant, axes)
        }""",
        constant_2=np.array([-1, 5]),
        axes=graphs.random(5),
    )
    assert name_initializers.apply(model, {"constant": graphs.random(6)}) == 0
    assert set(model.graph.initializers) == {"shape_2", "constant_2"}
    x = graphs.random(3, 5, seed=1)
    want = x * graphs.random(5)
    np.testing.assert_array_equal(graphs.run(model, shape=x), want)
