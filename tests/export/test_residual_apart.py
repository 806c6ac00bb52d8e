import graphs
import numpy as np
import onnx_ir as ir

from keras_peft.export.passes import residual_apart
from keras_peft.export.passes import rewriting

RESIDUAL = """g (float[a, b, 6] x) => (float[a, b, 6] y) {
    product = MatMul(x, kernel)
    biased = Add(product, bias)
    total = Add(biased, x)
    y = LayerNormalization(total, gamma, beta)
}"""


def residual():
    model = graphs.graph(
        RESIDUAL,
        kernel=graphs.random(6, 6),
        bias=graphs.random(6, seed=1),
        gamma=graphs.random(6, seed=2),
        beta=graphs.random(6, seed=3),
    )
    total = model.graph.outputs[0].producer().inputs[0]
    total.shape = ir.Shape(["a", "b", 6])
    return model


def test_sum_and_normalization_stay_apart_in_the_runtime():
    model = residual()
    x = graphs.random(2, 3, 6, seed=4)
    want = graphs.run(model, x=x)
    assert "SkipLayerNormalization" in graphs.fused_ops(model)
    assert residual_apart.apply(model) == 1
    rewriting.clean(model)
    assert "SkipLayerNormalization" not in graphs.fused_ops(model)
    # The same two operators, fused before: one rounding of 6 terms more.
    tolerance = 16 * 2**-23 * np.abs(want).max()
    np.testing.assert_allclose(graphs.run(model, x=x), want, atol=tolerance)


def test_a_sum_with_a_constant_is_left_alone():
    model = graphs.graph(
        """g (float[a, b, 6] x) => (float[a, b, 6] y) {
            total = Add(x, bias)
            y = LayerNormalization(total, gamma, beta)
        }""",
        bias=graphs.random(6),
        gamma=graphs.random(6, seed=1),
        beta=graphs.random(6, seed=2),
    )
    assert residual_apart.apply(model) == 0
