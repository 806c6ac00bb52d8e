import graphs
import numpy as np
import onnx_ir as ir

from keras_peft.export import quantize
from keras_peft.export import smooth

BLOCK = """g (float[a, 32] x) => (float[a, 8] y) {
    normal = LayerNormalization(x, gamma, beta)
    y = MatMul(normal, kernel)
}"""


def block():
    """A product whose input has two channels far larger than the rest."""
    gamma = np.ones(32, "float32")
    gamma[[3, 17]] = 60
    return graphs.graph(
        BLOCK,
        gamma=gamma,
        beta=graphs.random(32, seed=1),
        kernel=graphs.random(32, 8) / gamma[:, None],
    )


def error_of_int8(model, x, want):
    quantize.quantize_int8(model)
    return np.abs(graphs.run(model, x=x) - want).max()


def test_smoothing_keeps_the_product_and_helps_int8():
    x = graphs.random(64, 32, seed=2)
    model = block()
    want = graphs.run(model, x=x)
    ranges = smooth.channel_ranges(ir.to_proto(model), [{"x": x}])
    assert smooth.smooth(model, ranges) == 1
    # 32 products of two factors that were each rounded once more.
    bound = 34 * 2**-23 * np.abs(want).max()
    np.testing.assert_allclose(graphs.run(model, x=x), want, atol=bound)
    assert error_of_int8(model, x, want) < error_of_int8(block(), x, want) / 2


def test_an_input_behind_an_activation_is_left_alone():
    model = graphs.graph(
        """g (float[a, 32] x) => (float[a, 8] y) {
            active = Relu(x)
            y = MatMul(active, kernel)
        }""",
        kernel=graphs.random(32, 8),
    )
    assert smooth.channel_ranges(ir.to_proto(model), []) == {}
    assert smooth.smooth(model, {}) == 0
