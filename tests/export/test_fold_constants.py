import graphs
import numpy as np

from keras_peft.export.passes import fold_constants

KERNEL = """g (float[a, 6] x) => (float[a, 4] y) {
    turned = Transpose <perm = [1, 0, 2]> (kernel)
    flat = Reshape(turned, shape)
    y = MatMul(x, flat)
}"""


def test_a_kernel_takes_the_shape_of_the_matrix():
    model = graphs.graph(
        KERNEL, kernel=graphs.random(3, 2, 4), shape=np.array([6, -1])
    )
    x = graphs.random(5, 6, seed=1)
    want = graphs.run(model, x=x)
    assert fold_constants.apply(model) == 2
    assert graphs.ops(model) == {"MatMul": 1}
    np.testing.assert_array_equal(graphs.run(model, x=x), want)


def test_a_reshaped_activation_is_left_alone():
    model = graphs.graph(
        """g (float[a, 6] x) => (float[b, 3] y) {
            y = Reshape(x, shape)
        }""",
        shape=np.array([-1, 3]),
    )
    assert fold_constants.apply(model) == 0


def test_a_shape_computed_from_a_constant_is_folded_too():
    model = graphs.graph(
        """g (float[a, 6] x) => (float[a, 4] y) {
            sizes = Shape(kernel)
            columns = Gather(sizes, last)
            shape = Concat <axis = 0> (rows, columns)
            flat = Reshape(kernel, shape)
            y = MatMul(x, flat)
        }""",
        kernel=graphs.random(3, 2, 4),
        last=np.array([2]),
        rows=np.array([-1]),
    )
    assert fold_constants.apply(model) == 4
    assert graphs.ops(model) == {"MatMul": 1}
