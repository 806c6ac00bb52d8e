import graphs
import numpy as np

from keras_peft.export.passes import fold_scale

SCALED = """g (float[a, b, 6] x) => (float[a, b, 2, 2] y{more}) {{
    product = MatMul(x, kernel)
    biased = Add(product, bias)
    split = Reshape(biased, shape)
    y = Mul(split, scale)
    {extra}
}}"""


def scaled(more="", extra=""):
    return graphs.graph(
        SCALED.format(more=more, extra=extra),
        kernel=graphs.random(6, 4),
        bias=graphs.random(4, seed=1),
        shape=np.array([0, 0, 2, 2]),
        scale=np.float32(0.3),
    )


def test_a_scale_moves_into_kernel_and_bias():
    model = scaled()
    x = graphs.random(2, 3, 6, seed=2)
    want = graphs.run(model, x=x)
    assert fold_scale.apply(model) == 1
    assert graphs.ops(model)["Mul"] == 0
    # Sums of 6 products, each factor rounded once more.
    tolerance = 8 * 2**-23 * np.abs(want).max()
    np.testing.assert_allclose(graphs.run(model, x=x), want, atol=tolerance)


def test_a_projection_with_another_user_keeps_its_scale():
    model = scaled(", float[a, b, 4] z", "z = Relu(biased)")
    assert fold_scale.apply(model) == 0
    assert graphs.ops(model)["Mul"] == 1


def test_a_scale_behind_an_activation_is_left_alone():
    model = graphs.graph(
        """g (float[a, 6] x) => (float[a, 4] y) {
            product = MatMul(x, kernel)
            active = Tanh(product)
            y = Mul(active, scale)
        }""",
        kernel=graphs.random(6, 4),
        scale=np.float32(0.3),
    )
    assert fold_scale.apply(model) == 0
