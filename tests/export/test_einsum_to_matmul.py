import graphs
import numpy as np
import pytest

from keras_peft.export.passes import einsum_to_matmul

# Sums of 12 float32 products, rounded in another order.
TOLERANCE = 12 * 2**-23


@pytest.mark.parametrize(
    ("equation", "inputs", "kernel"),
    [
        ("abc,cde->abde", (2, 5, 6), (6, 3, 4)),
        ("abcd,cde->abe", (2, 5, 3, 4), (3, 4, 6)),
        ("btd,ndh->btnh", (2, 5, 6), (3, 6, 4)),
        ("btnh,nhd->btd", (2, 5, 3, 4), (3, 4, 6)),
        ("ab,bc->ac", (2, 6), (6, 4)),
    ],
)
def test_einsum_with_a_kernel_becomes_a_matmul(equation, inputs, kernel):
    terms, out = equation.split("->")
    model_inputs = ", ".join(terms.split(",")[0])
    text = f"""g (float[{model_inputs}] x) => (float[{", ".join(out)}] y) {{
        y = Einsum <equation = "{equation}"> (x, kernel)
    }}"""
    x, w = graphs.random(*inputs), graphs.random(*kernel, seed=1)
    model = graphs.graph(text, kernel=w)
    assert einsum_to_matmul.apply(model) == 1
    assert graphs.ops(model)["Einsum"] == 0
    assert graphs.ops(model)["MatMul"] == 1
    want = np.einsum(equation, x, w)
    np.testing.assert_allclose(
        graphs.run(model, x=x), want, atol=TOLERANCE * np.abs(want).max() * 4
    )


def test_bias_moves_in_front_of_the_reshape():
    model = graphs.graph(
        """g (float[a, b, 6] x) => (float[a, b, 3, 4] y) {
            z = Einsum <equation = "abc,cde->abde"> (x, kernel)
            y = Add(z, bias)
        }""",
        kernel=graphs.random(6, 3, 4),
        bias=graphs.random(3, 4, seed=1),
    )
    x = graphs.random(2, 5, 6, seed=2)
    want = graphs.run(model, x=x)
    assert einsum_to_matmul.apply(model) == 1
    assert [n.op_type for n in model.graph] == ["MatMul", "Add", "Reshape"]
    np.testing.assert_allclose(
        graphs.run(model, x=x), want, atol=TOLERANCE * np.abs(want).max()
    )


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [
        ("aecd,abcd->acbe", (2, 7, 3, 4), (2, 5, 3, 4)),
        ("acbe,aecd->abcd", (2, 3, 5, 7), (2, 7, 3, 4)),
        ("abcd,aecd->acbe", (2, 5, 3, 4), (2, 7, 3, 4)),
    ],
)
def test_batched_einsum_becomes_a_matmul(equation, left, right):
    model = graphs.graph(
        f"""g (float[k, l, m, n] x, float[p, q, r, s] z)
            => (float[t, u, v, w] y) {{
            y = Einsum <equation = "{equation}"> (x, z)
        }}"""
    )
    x, z = graphs.random(*left), graphs.random(*right, seed=1)
    assert einsum_to_matmul.apply(model) == 1
    assert graphs.ops(model)["Einsum"] == 0
    want = np.einsum(equation, x, z)
    np.testing.assert_allclose(
        graphs.run(model, x=x, z=z), want, atol=TOLERANCE * np.abs(want).max()
    )


def test_an_outer_product_becomes_a_product():
    model = graphs.graph(
        """g (float[a, b] x) => (float[a, b, c] y) {
            y = Einsum <equation = "bi,j->bij"> (x, angles)
        }""",
        angles=graphs.random(4),
    )
    x = graphs.random(2, 3, seed=1)
    want = graphs.run(model, x=x)
    assert einsum_to_matmul.apply(model) == 1
    assert graphs.ops(model) == {"Unsqueeze": 1, "Mul": 1}
    np.testing.assert_array_equal(graphs.run(model, x=x), want)


def test_a_contraction_of_the_first_axis_is_left_alone():
    model = graphs.graph(
        """g (float[a, b] x) => (float[b, c] y) {
            y = Einsum <equation = "ab,ac->bc"> (x, kernel)
        }""",
        kernel=graphs.random(5, 4),
    )
    assert einsum_to_matmul.apply(model) == 0
