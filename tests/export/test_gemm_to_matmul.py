import graphs
import numpy as np
import pytest

from keras_peft.export.passes import gemm_to_matmul

# Sums of 6 products, scaled and rounded in another order.
TOLERANCE = 8 * 2**-23


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_becomes_matmul_and_add(alpha, transposed):
    kernel = graphs.random(4, 6) if transposed else graphs.random(6, 4)
    model = graphs.graph(
        f"""g (float[a, 6] x) => (float[a, 4] y) {{
            y = Gemm <alpha = {alpha}, beta = 0.5, transB = {transposed}>
                (x, kernel, bias)
        }}""",
        kernel=kernel,
        bias=graphs.random(4, seed=1),
    )
    x = graphs.random(3, 6, seed=2)
    want = graphs.run(model, x=x)
    assert gemm_to_matmul.apply(model) == 1
    assert graphs.ops(model) == {"MatMul": 1, "Add": 1}
    np.testing.assert_allclose(
        graphs.run(model, x=x), want, atol=TOLERANCE * np.abs(want).max()
    )


def test_gemm_of_a_transposed_input_is_left_alone():
    model = graphs.graph(
        """g (float[6, a] x) => (float[a, 4] y) {
            y = Gemm <transA = 1> (x, kernel)
        }""",
        kernel=graphs.random(6, 4),
    )
    assert gemm_to_matmul.apply(model) == 0


def test_gemm_of_two_activations_is_left_alone():
    model = graphs.graph(
        """g (float[a, b] x, float[b, c] z) => (float[a, c] y) {
            y = Gemm(x, z)
        }"""
    )
    assert gemm_to_matmul.apply(model) == 0


def test_gemm_without_a_bias_ignores_its_factor():
    model = graphs.graph(
        """g (float[a, 6] x) => (float[a, 4] y) {
            y = Gemm <beta = 0.0> (x, kernel)
        }""",
        kernel=graphs.random(6, 4),
    )
    assert gemm_to_matmul.apply(model) == 1
    assert graphs.ops(model) == {"MatMul": 1}
