"""Networks inside transformer blocks, against the papers in NumPy."""

import keras
import numpy as np
import pytest
from backbones import BACKBONES
from backbones import inputs
from backbones import outputs
from models import build
from models import data
from table import randomize
from table import rounding

import keras_peft
from keras_peft import adapter_state

numpy = keras.ops.convert_to_numpy
# Products of 16 terms at most, some ten of them in a row.
CLOSE = 16 * 16 * rounding("float32")


# -- One block of BERT by hand -----------------------------------------------


def gelu(x):
    """The approximation that BERT and Keras' `gelu` share in float32."""
    return x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def exact_gelu(x):
    return numpy(keras.activations.gelu(x.astype("float32"))).astype("float64")


def relu(x):
    return np.maximum(x, 0)


def norm(layer, x):
    scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(
        x.var(-1, keepdims=True) + layer.epsilon
    )
    return scaled * numpy(layer.gamma) + numpy(layer.beta)


def attention(layer, x):
    def project(dense):
        projected = np.einsum("btd,dnh->bnth", x, numpy(dense.kernel))
        return projected + numpy(dense.bias)[:, None]

    query, key, value = map(
        project, (layer.query_dense, layer.key_dense, layer.value_dense)
    )
    scores = query @ key.swapaxes(2, 3) / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("bnth,nhd->btd", weights @ value, numpy(out(layer)))
    return mixed + numpy(layer.output_dense.bias)


def out(layer):
    return layer.output_dense.kernel


def block(layer, x, attended=lambda o: o, fed=lambda o, x: o):
    """A block of BERT, with what adapters make of its sublayers' outputs."""
    x = x.astype("float64")
    own = attention(layer._self_attention_layer, x)
    x = norm(layer._self_attention_layer_norm, x + attended(own))
    begin = layer._feedforward_intermediate_dense
    end = layer._feedforward_output_dense
    inner = gelu(x @ numpy(begin.kernel) + numpy(begin.bias))
    own = inner @ numpy(end.kernel) + numpy(end.bias)
    return norm(layer._feedforward_layer_norm, x + fed(own, x))


def bottleneck(x, activation, down, down_bias, up, up_bias):
    return activation(x @ down + down_bias) @ up + up_bias


def adapted_block(method):
    """`(layer, inputs, its outputs, {end of path: arrays})`."""
    model = build("bert-backbone")
    keras_peft.adapt(model, method)
    randomize(model)
    found = {
        path.removeprefix("transformer_layers.0").lstrip("._"): {
            key: numpy(value).astype("float64")
            for key, value in leaf.parameters.items()
        }
        for path, leaf in adapter_state.leaves(model, "default").items()
        if path.startswith("transformer_layers.0")
    }
    layer = model.transformer_layers[0]
    x = np.random.default_rng(5).normal(size=(2, 6, 8)).astype("float32")
    return layer, x, numpy(layer(x)), found


def assert_close(found, expected):
    assert np.abs(found - expected).max() <= CLOSE * np.abs(expected).max()


ATTENTION = "self_attention_layer.output_dense"
FEED_FORWARD = "feedforward_output_dense"


def test_the_reference_is_the_block_itself():
    layer = build("bert-backbone").transformer_layers[0]
    x = np.random.default_rng(5).normal(size=(2, 6, 8)).astype("float32")
    assert_close(numpy(layer(x)), block(layer, x))


def test_pfeiffers_adapter_follows_the_feed_forward_part():
    method = keras_peft.BottleneckAdapter(reduction=2, scale=0.5)
    layer, x, found, weights = adapted_block(method)
    own = weights.pop(FEED_FORWARD).values()
    assert not weights
    expected = block(
        layer, x, fed=lambda o, x: o + 0.5 * bottleneck(o, relu, *own)
    )
    assert_close(found, expected)


def test_houlsbys_adapters_follow_attention_and_feed_forward_part():
    method = keras_peft.BottleneckAdapter(2, "gelu", placement="double")
    layer, x, found, weights = adapted_block(method)
    first, second = weights[ATTENTION].values(), weights[FEED_FORWARD].values()
    expected = block(
        layer,
        x,
        attended=lambda o: o + bottleneck(o, exact_gelu, *first),
        fed=lambda o, x: o + bottleneck(o, exact_gelu, *second),
    )
    assert_close(found, expected)


def test_hes_adapter_stands_beside_the_feed_forward_part():
    method = keras_peft.BottleneckAdapter(2, placement="parallel", scale=4.0)
    layer, x, found, weights = adapted_block(method)
    assert weights.pop("feedforward_intermediate_dense") == {}
    own = weights[FEED_FORWARD].values()
    expected = block(
        layer, x, fed=lambda o, x: o + 4.0 * bottleneck(x, relu, *own)
    )
    assert_close(found, expected)


def test_compacters_kernels_are_sums_of_kronecker_products():
    method = keras_peft.Compacter(reduction=2, num_terms=2, rank=2)
    layer, x, found, weights = adapted_block(method)
    holder = next(w for w in weights.values() if "compacter_shared" in w)
    shared = holder["compacter_shared"]
    assert sum("compacter_shared" in w for w in weights.values()) == 1

    def kernel(own, side):
        left, right = (own[f"compacter_{side}_{s}"] for s in ("left", "right"))
        return sum(np.kron(shared[i], left[i] @ right[i]) for i in range(2))

    def of(name):
        own = weights[name]
        down, up = own["compacter_down_bias"], own["compacter_up_bias"]
        return lambda o, *_: (
            o
            + bottleneck(
                o, exact_gelu, kernel(own, "down"), down, kernel(own, "up"), up
            )
        )

    assert_close(
        found, block(layer, x, attended=of(ATTENTION), fed=of(FEED_FORWARD))
    )


def test_adapter_plus_follows_the_block_and_scales_channels():
    layer, x, found, weights = adapted_block(keras_peft.AdapterPlus(rank=2))
    *own, scale = weights[""].values()
    h = block(layer, x)
    assert_close(found, h + scale * bottleneck(h, exact_gelu, *own))


@pytest.mark.parametrize("variant", ["loreft", "direft"])
def test_reft_edits_the_first_and_last_tokens(variant):
    method = keras_peft.ReFT(2, 1, 2, variant)
    layer, x, found, weights = adapted_block(method)
    r, w, b = weights[""].values()
    if variant == "loreft":
        # The rows of `r`, made orthonormal from the first on; signs are kept.
        q, triangle = np.linalg.qr(r.T)
        r = (q * np.sign(np.diag(triangle))).T
        assert np.allclose(r @ r.T, np.eye(2))
        w = w - r
    h = block(layer, x)
    edited = h + (h @ w.T + b) @ r
    where = np.isin(np.arange(6), [0, 4, 5])[:, None]
    assert_close(found, np.where(where, edited, h))


def test_reft_counts_tokens_and_no_padding():
    model = build("bert-backbone")
    layer = model.transformer_layers[0]
    x = np.random.default_rng(5).normal(size=(4, 6, 8)).astype("float32")
    mask = np.array(
        [
            [1, 1, 1, 1, 1, 1],
            [1, 1, 1, 1, 1, 0],
            [0, 0, 1, 1, 1, 1],
            [1, 1, 0, 0, 0, 0],
        ]
    )
    before = numpy(layer(x, padding_mask=mask))
    keras_peft.adapt(model, keras_peft.ReFT(2, 1, 2))
    randomize(model)
    after = numpy(layer(x, padding_mask=mask))
    edited = [
        [1, 0, 0, 0, 1, 1],
        [1, 0, 0, 1, 1, 0],
        [0, 0, 1, 0, 1, 1],
        [1, 1, 0, 0, 0, 0],
    ]
    assert np.array_equal((before != after).any(-1), np.array(edited, "bool"))


def test_stochastic_depth_leaves_whole_samples_alone_in_training_only():
    layer, x, found, _ = adapted_block(
        keras_peft.AdapterPlus(rank=2, stochastic_depth=0.5)
    )
    x = np.concatenate([x] * 16)
    whole = numpy(layer(x))
    trained = numpy(layer(x, training=True))
    base = block(layer, x)
    # What is kept counts twice, so that the mean over training is the whole.
    kept = np.abs(trained - base).max((1, 2)) > CLOSE * np.abs(base).max()
    assert 0 < kept.sum() < len(x)
    assert_close(trained[kept] - base[kept], 2 * (whole - base)[kept])


# -- Every family ------------------------------------------------------------

METHODS = {
    "sequential": keras_peft.BottleneckAdapter(reduction=2),
    "double": keras_peft.BottleneckAdapter(reduction=2, placement="double"),
    "parallel": keras_peft.BottleneckAdapter(reduction=2, placement="parallel"),
    "reft": keras_peft.ReFT(rank=2, variant="direft"),
}


# What keras-hub's RoFormer, and its T5, warn of at every call.
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.filterwarnings("ignore:.*does not support masking")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BACKBONES)
def test_every_block_of_every_family_carries_its_adapters(name, method):
    row, settings = BACKBONES[name], METHODS[method]
    model = row.build()
    given = inputs(model)
    before = outputs(model, given)
    if row.experts and method != "reft":
        with pytest.raises(ValueError, match="feed forward outputs"):
            keras_peft.adapt(model, settings)
        return
    keras_peft.adapt(model, settings)
    assert np.array_equal(outputs(model, given), before)
    leaves = adapter_state.leaves(model, "default")
    expected = {
        "sequential": row.blocks,
        "double": 2 * row.blocks + row.cross,
        "parallel": 2 * row.blocks,
        "reft": row.blocks,
    }
    assert len(leaves) == expected[method]
    for path, leaf in leaves.items():
        if not leaf.parameters:
            continue
        leaf.strength.assign(1.0)
        for variable in leaf.learned:
            variable.assign(np.full(variable.shape, 0.5, "float32"))
        assert not np.array_equal(outputs(model, given), before), path
        leaf.strength.assign(0.0)


# A task of each way to call a block with a cache.
TASKS = {
    "gpt2": "GPT2CausalLM",
    "llama": "LlamaCausalLM",
    "bloom": "BloomCausalLM",
    "falcon": "FalconCausalLM",
    "phi3": "Phi3CausalLM",
    "gemma": "GemmaCausalLM",
    "gemma3": "Gemma3CausalLM",
    "smollm3": "SmolLM3CausalLM",
    "mixtral": "MixtralCausalLM",
    "bart": "BartSeq2SeqLM",
    "t5": "T5Seq2SeqLM",
}


def task(name):
    """A task that writes greedily, all its matrices random."""
    import keras_hub

    row = BACKBONES[name]
    kind = getattr(keras_hub.models, TASKS[name])
    model = kind(backbone=row.build(), preprocessor=None)
    model.compile(sampler="greedy")
    rng = np.random.default_rng(0)
    for variable in model.variables:
        if len(variable.shape) > 1:
            noise = rng.normal(scale=0.5, size=variable.shape)
            variable.assign(noise.astype("float32"))
    return model


@pytest.mark.filterwarnings("ignore:.*does not support masking")
@pytest.mark.parametrize(
    "name, method",
    [
        pytest.param(
            name,
            method,
            id=f"{name}-{method}",
            marks=[pytest.mark.slice] * (name == "gpt2"),
        )
        for name in TASKS
        for method in ("reft", "parallel")
        if method == "reft" or not BACKBONES[name].experts
    ],
)
def test_generation_with_a_cache_is_greedy_over_the_adapted_logits(
    name, method
):
    model = task(name)
    rng = np.random.default_rng(2)
    side = "decoder_" if BACKBONES[name].cross else ""
    given = {}
    if side:
        given["encoder_token_ids"] = rng.integers(1, 20, (2, 5))
        given["encoder_padding_mask"] = np.arange(5) < [[5], [3]]
    tokens = rng.integers(1, 20, (2, 7))
    # The first text begins shorter than what is edited of it.
    lengths = np.array([2, 4])
    prompt = np.arange(7) < lengths[:, None]

    def by_logits():
        expected = np.where(prompt, tokens, 0)
        for position in range(2, 7):
            seen = np.tile(np.arange(7) < position, (2, 1))
            text = {f"{side}token_ids": expected, f"{side}padding_mask": seen}
            logits = numpy(model(given | text))[:, position - 1]
            written = position >= lengths
            kept = expected[:, position]
            expected[:, position] = np.where(written, logits.argmax(-1), kept)
        return expected

    base = by_logits()
    keras_peft.adapt(model, METHODS[method])
    randomize(model, scale=1.0)
    expected = by_logits()
    assert not np.array_equal(base, expected)
    start = {f"{side}token_ids": np.where(prompt, tokens, 0)}
    start |= {f"{side}padding_mask": prompt} | given
    start = {k: keras.ops.convert_to_tensor(v) for k, v in start.items()}
    found = model.generate_step(start, stop_token_ids=None)
    assert np.array_equal(numpy(found[f"{side}token_ids"]), expected)


def test_last_positions_of_a_text_that_grows_are_an_error():
    model = build("gpt2")
    keras_peft.adapt(model, keras_peft.ReFT(2, 1, 1))
    prompt = data("gpt2", samples=2)[0]
    with pytest.raises(ValueError, match="suffix_positions=0"):
        model.generate(prompt, stop_token_ids=None)


def test_a_parallel_adapter_takes_whole_feed_forward_parts():
    model = build("bert-backbone")
    method = METHODS["parallel"]
    ends = ["feedforward_intermediate_dense", "feedforward_output_dense"]
    with pytest.raises(ValueError, match="first and its last layer"):
        keras_peft.adapt(model, method, targets=ends[1])
    keras_peft.adapt(
        model, method, [rf"transformer_layers\.1\._{end}" for end in ends]
    )
    assert len(model.peft.adapters["default"].paths) == 2


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: keras_peft.BottleneckAdapter(0), "reduction"),
        (lambda: keras_peft.BottleneckAdapter(scale=0), "scale"),
        (lambda: keras_peft.BottleneckAdapter(activation="no"), "activation"),
        (lambda: keras_peft.BottleneckAdapter(placement="no"), "placement"),
        (lambda: keras_peft.AdapterPlus(rank=0), "rank"),
        (lambda: keras_peft.AdapterPlus(stochastic_depth=1), "stochastic"),
        (lambda: keras_peft.Compacter(num_terms=0), "num_terms"),
        (lambda: keras_peft.Compacter(placement="parallel"), "placement"),
        (lambda: keras_peft.ReFT(0), "rank"),
        (lambda: keras_peft.ReFT(prefix_positions=0), "not both 0"),
        (lambda: keras_peft.ReFT(variant="noreft"), "variant"),
    ],
)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(ValueError, match=f"{message}.*Received: "):
        make()


@pytest.mark.parametrize(
    "method, targets, message",
    [
        (keras_peft.BottleneckAdapter(9), None, "leaves nothing of its 8"),
        (keras_peft.BottleneckAdapter(2), "query", "output projection"),
        (keras_peft.Compacter(2, num_terms=3), None, "num_terms 3"),
        (keras_peft.ReFT(rank=9), None, "hidden size of 8"),
    ],
)
def test_layers_that_do_not_fit_are_named(method, targets, message):
    with pytest.raises(ValueError, match=message):
        keras_peft.adapt(build("bert-backbone"), method, targets)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_without_blocks_is_an_error(method):
    with pytest.raises(ValueError, match="no transformer blocks"):
        keras_peft.adapt(build("sequential"), METHODS[method])
