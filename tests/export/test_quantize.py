import graphs
import numpy as np
import pytest

from keras_peft.export import quantize


def stored(model):
    return {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
    }


def test_a_product_is_off_by_half_a_step_at_most():
    kernel = graphs.random(64, 8)
    model = graphs.graph(
        "g (float[a, b, 64] x) => (float[a, b, 8] y) { y = MatMul(x, kernel) }",
        kernel=kernel,
    )
    x = graphs.random(2, 3, 64, seed=1)
    quantize.quantize_int8(model)
    arrays = stored(model)
    assert arrays["kernel/int8"].dtype == np.int8
    assert not any(a.dtype == np.float32 for a in arrays.values())
    got = graphs.run(model, x=x)
    # Half a step per factor: the input's range has 255 steps, a column's 254.
    steps = (x.max() - x.min()) / 255, 2 * np.abs(kernel).max() / 254 * 1.001
    bound = (steps[0] * np.abs(kernel).sum(0).max() / 2) + (
        steps[1] * (np.abs(x).sum(-1).max() + 64 * steps[0]) / 2
    )
    assert np.abs(got - x @ kernel).max() <= bound


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_every_weight_is_off_by_half_its_scale_at_most(size):
    content = size * graphs.random(9, 7)
    integers, scale = quantize._integers(content, (1,))
    restored = integers.astype("float64") * scale.astype("float64")
    assert np.abs(integers.astype("int32")).max() <= 127
    # The quotient that is rounded to an integer is itself a float32.
    bound = scale.astype("float64") * (0.5 + 127 * 2**-23)
    assert (np.abs(restored - content) <= bound).all()


def test_a_table_is_stored_by_row():
    table = graphs.random(10, 6) * np.logspace(-2, 2, 10)[:, None]
    model = graphs.graph(
        "g (int32[a, b] ids) => (float[a, b, 6] y) { y = Gather(table, ids) }",
        table=table.astype("float32"),
    )
    quantize.quantize_int8(model)
    ids = np.array([[0, 9], [4, 4]], "int32")
    got = graphs.run(model, ids=ids)
    # Half a step of each row's own range; its scale rounds up by 2**-10.
    bound = np.abs(table[ids]).max(-1, keepdims=True) / 254 * (1 + 2**-9)
    assert (np.abs(got - table[ids]) <= bound).all()


def test_a_tied_table_is_stored_once():
    model = graphs.graph(
        """g (int32[a, b] ids) => (float[a, b, 50] y) {
            x = Gather(table, ids)
            kernel = Transpose <perm = [1, 0]> (table)
            y = MatMul(x, kernel)
        }""",
        table=graphs.random(50, 16),
    )
    ids = np.array([[1, 2, 3]], "int32")
    want = graphs.run(model, ids=ids)
    quantize.quantize_int8(model)
    matrices = [a for a in stored(model).values() if a.dtype == np.int8]
    assert [a.shape for a in matrices] == [(50, 16)]
    got = graphs.run(model, ids=ids)
    # 16 products, each of two factors rounded to 1 in 254 of their range.
    bound = 16 * 3 * np.abs(want).max() / 254
    assert np.abs(got - want).max() <= bound


def test_a_convolution_stores_int8_and_computes_in_float():
    kernel = graphs.random(4, 3, 3, 3)
    model = graphs.graph(
        """g (float[a, 3, h, w] x) => (float[a, 4, i, j] y) {
            y = Conv(x, kernel)
        }""",
        kernel=kernel,
    )
    x = graphs.random(1, 3, 8, 8, seed=1)
    want = graphs.run(model, x=x)
    quantize.quantize_int8(model)
    assert stored(model)["kernel/int8"].dtype == np.int8
    # Half a step of the kernel's range in each of 27 products.
    bound = 27 * np.abs(kernel).max() / 254 * 1.01 * np.abs(x).max()
    assert np.abs(graphs.run(model, x=x) - want).max() <= bound


def test_vectors_stay_in_float_and_say_why():
    model = graphs.graph(
        "g (float[a, 6] x) => (float[a, 6] y) { y = Add(x, bias) }",
        bias=graphs.random(6),
    )
    left = quantize.quantize_int8(model)
    assert [weight.name for weight in left] == ["bias"]
    assert "one number per channel" in left[0].reason
