import graphs
import numpy as np

from keras_peft.export.passes import mask_by_adding

ATTENTION = """g (float[b, h, q, k] scores, bool[{mask}] mask,
    float[b, h, k, d] values) => (float[b, h, q, d] y) {{
    inner = Where(mask, scores, low)
    weights = Softmax <axis = -1> (inner)
    outer = Where(mask, weights, zero)
    y = MatMul(outer, values)
}}"""
LOWEST = np.finfo("float32").min


def attention(mask):
    return graphs.graph(
        ATTENTION.format(mask=mask), low=LOWEST, zero=np.float32(0)
    )


def test_masked_attention_stays_the_same_with_an_empty_row():
    model = attention("b, 1, 1, k")
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    inputs = {
        "scores": 10 * graphs.random(3, 2, 4, 5),
        "mask": mask[:, None, None],
        "values": graphs.random(3, 2, 5, 6, seed=1),
    }
    want = graphs.run(model, **inputs)
    assert mask_by_adding.apply(model) == 1
    # Two selections per layer became one sum; one selection makes the bias.
    assert graphs.ops(model)["Where"] == 1
    got = graphs.run(model, **inputs)
    # A score and a bias of 0 add up exactly.
    np.testing.assert_array_equal(got, want)
    assert not got[2].any()


def test_a_causal_mask_stays_the_same_with_a_row_without_keys():
    model = attention("b, 1, q, k")
    mask = np.tril(np.ones((5, 5), bool)) & (np.arange(5) > 0)
    inputs = {
        "scores": 10 * graphs.random(2, 2, 5, 5),
        "mask": np.stack([mask[None]] * 2),
        "values": graphs.random(2, 2, 5, 6, seed=1),
    }
    want = graphs.run(model, **inputs)
    assert mask_by_adding.apply(model) == 1
    got = graphs.run(model, **inputs)
    np.testing.assert_array_equal(got, want)
    assert not got[:, :, 0].any()


def test_a_mild_penalty_is_left_alone():
    model = graphs.graph(
        ATTENTION.format(mask="b, 1, 1, k"),
        low=np.float32(-2),
        zero=np.float32(0),
    )
    assert mask_by_adding.apply(model) == 0
