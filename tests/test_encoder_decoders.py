"""Laws of methods that add tokens to encoder-decoders."""

import keras
import numpy as np
import pytest
from backbones import BACKBONES
from models import same_bits
from models import values
from table import randomize
from test_prompts import causal_lm
from test_prompts import close
from test_prompts import generated
from test_prompts import numpy
from test_prompts import owner

import keras_peft
from keras_peft import adapter_state
from keras_peft import layer_tree

ops = keras.ops
# T5's own.
pytestmark = pytest.mark.filterwarnings("ignore:.*support masking")
FAMILIES = ("bart", "t5")
METHODS = {
    "prompt": keras_peft.PromptTuning(2),
    "two-prompts": keras_peft.PromptTuning(2, decoder=True),
    "prefix": keras_peft.PrefixTuning(2),
    "prefix-network": keras_peft.PrefixTuning(2, hidden_dim=5),
}
TABLE = [
    pytest.param(family, method, id=f"{family}-{name}")
    for family in FAMILIES
    for name, method in METHODS.items()
]


def texts(samples=4):
    """Inputs of an encoder-decoder, the last texts padded."""
    rng = np.random.default_rng(5)
    found = {}
    for part, length in (("encoder", 6), ("decoder", 5)):
        tokens = rng.integers(1, 20, (samples, length)).astype("int32")
        mask = np.ones((samples, length), "bool")
        mask[-1, 3:] = False
        found[f"{part}_token_ids"] = tokens
        found[f"{part}_padding_mask"] = mask
    return found


def adapted(family, method, scale=0.5):
    model = causal_lm(family)
    keras_peft.adapt(model, method)
    randomize(model, scale=scale)
    return model


def fit(model):
    """Trains with plain `fit`."""
    inputs = texts()
    model.compile(
        optimizer=keras.optimizers.Adam(0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(True),
    )
    # keras-hub's own `fit` adds a preprocessing pipeline around this one.
    keras.Model.fit(
        model, inputs, inputs["decoder_token_ids"], epochs=2, verbose=0
    )


# -- What is computed --------------------------------------------------------


def prefixed(layer, scale=1.0):
    """The adapter of one attention alone, all weights random."""
    method = keras_peft.PrefixTuning(4)
    leaf = method.create_all({"": layer}, "default")[""]
    rng = np.random.default_rng(0)
    for variable in (*layer.variables, *leaf.learned):
        if "seed_generator" not in variable.path:
            noise = rng.normal(scale=scale, size=variable.shape)
            variable.assign(noise.astype("float32"))
    layer_tree.attach(layer, "default", leaf)
    leaf.present = True
    return leaf


def attention_by_hand(x, kernels, prefix, bias, seen):
    """`(batch, tokens, heads, size)` by Eq. 2 of the paper."""
    query, key, value = (np.einsum("bsd,dhk->bshk", x, k) for k in kernels)
    learned = np.repeat(prefix[None], len(x), axis=0)
    key = np.concatenate([learned[:, :, 0], key], axis=1)
    value = np.concatenate([learned[:, :, 1], value], axis=1)
    scores = np.einsum("bqhk,bshk->bhqs", query, key)
    front = ((0, 0), (0, 0), (prefix.shape[0], 0))
    # No position is that of a learned key, and all queries see it.
    scores += np.pad(bias, front)
    weights = np.exp(scores) * np.pad(seen, front, constant_values=1)[:, None]
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhqs,bshk->bqhk", weights, value)


@pytest.mark.parametrize("decoder", [False, True])
def test_an_attention_of_t5_has_no_bias_for_its_prefix(decoder):
    from keras_hub.src.models.t5.t5_multi_head_attention import (
        T5MultiHeadAttention,
    )

    def build(owns_bias):
        layer = T5MultiHeadAttention(decoder, 8, 3, 2, 0.0, owns_bias)
        layer(np.zeros((1, 5, 8), "float32"))
        return layer, numpy(prefixed(layer, 0.3).prefix)[:, 0]

    first, prefix = build(True)
    later, later_prefix = build(False)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 5, 8)).astype("float32")
    seen = rng.integers(0, 2, (2, 5, 5))
    seen = np.tril(seen) if decoder else seen

    # Distances below 8 have a bucket each; after 16 those of later keys.
    distance = np.arange(5)[None] - np.arange(5)[:, None]
    bucket = np.maximum(-distance, 0) if decoder else np.abs(distance)
    bucket = bucket if decoder else bucket + 16 * (distance > 0)
    bias = numpy(first.relative_attention_bias)[bucket].transpose(2, 0, 1)

    def by_hand(layer, prefix):
        *kernels, output = (
            numpy(getattr(layer, f"{part}_projector").kernel)
            for part in ("query", "key", "value", "output")
        )
        kernels = [kernel.reshape(8, 2, 3) for kernel in kernels]
        mixed = attention_by_hand(x, kernels, prefix, bias, seen)
        return mixed.reshape(2, 5, 6) @ output

    found, position_bias, cache = first(x, mask=seen)
    assert cache is None
    assert close(found, by_hand(first, prefix))
    # The layers above read bias and mask from the first.
    found, *_ = later(x, position_bias=position_bias)
    assert close(found, by_hand(later, later_prefix))

    cache = ops.zeros((2, 2, 5, 2, 3))
    expected = by_hand(first, prefix)
    for i in range(5 if decoder else 0):
        found, _, cache = first(
            x[:, i : i + 1],
            mask=seen[:, i : i + 1],
            cache=cache,
            cache_update_index=i,
        )
        assert cache.shape == (2, 2, 5, 2, 3)
        assert close(found[:, 0], expected[:, i])


def test_an_attention_of_bart_puts_its_prefix_before_the_cache():
    import keras_hub

    layer = keras_hub.layers.CachedMultiHeadAttention(2, 3, use_bias=False)
    x = np.random.default_rng(1).normal(size=(2, 5, 8)).astype("float32")
    layer.build(x.shape, x.shape)
    prefix = numpy(prefixed(layer).prefix)[:, 0]
    seen = np.tril(np.ones((2, 5, 5), "int32"))
    *kernels, output = (
        numpy(getattr(layer, f"_{part}_dense").kernel)
        for part in ("query", "key", "value", "output")
    )
    kernels[0] = kernels[0] / np.sqrt(3)
    mixed = attention_by_hand(x, kernels, prefix, np.zeros((2, 5, 5)), seen)
    expected = np.einsum("bqhk,hkd->bqd", mixed, output)
    assert close(layer(x, x, attention_mask=seen), expected)
    cache = ops.zeros((2, 2, 5, 2, 3))
    for i in range(5):
        found, cache = layer(
            *(x[:, i : i + 1],) * 2,
            attention_mask=seen[:, i : i + 1],
            cache=cache,
            cache_update_index=i,
        )
        assert cache.shape == (2, 2, 5, 2, 3)
        assert close(found[:, 0], expected[:, i])


def test_positions_of_both_texts_begin_after_the_prefix():
    backbone = adapted("bart", METHODS["prefix"]).backbone
    inputs, hidden = texts(), {}
    found = backbone(inputs)
    for part in ("encoder", "decoder"):
        x = backbone.token_embedding(inputs[f"{part}_token_ids"])
        layer = getattr(backbone, f"{part}_position_embedding")
        x = x + numpy(layer.position_embeddings)[2:][: x.shape[1]]
        hidden[part] = getattr(backbone, f"{part}_embeddings_layer_norm")(x)
    mask = inputs["encoder_padding_mask"]
    for layer in backbone.encoder_transformer_layers:
        hidden["encoder"] = layer(hidden["encoder"], padding_mask=mask)
    for layer in backbone.decoder_transformer_layers:
        hidden["decoder"] = layer(
            hidden["decoder"],
            hidden["encoder"],
            decoder_padding_mask=inputs["decoder_padding_mask"],
            encoder_padding_mask=mask,
        )
    for part, expected in hidden.items():
        assert close(found[f"{part}_sequence_output"], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_attention_to_an_own_text_has_a_prefix(family):
    model = adapted(family, METHODS["prefix"])
    leaves = adapter_state.leaves(model, "default")
    assert not [path for path in leaves if "cross" in path]
    # Two blocks each, of two heads of four features.
    assert owner(model).prefix.shape == (2, 4, 2, 2, 4)
    network = keras_peft.PrefixTuning(2, hidden_dim=5)
    model = adapted(family, network)
    shapes = [v.shape for v in model.trainable_variables]
    count = 2 * 8 + (8 + 1) * 5 + (5 + 1) * 4 * 2 * 8
    assert sum(int(np.prod(shape)) for shape in shapes) == count


def test_an_encoder_decoder_of_your_own_takes_prefixes():
    import keras_hub

    texts = [keras.Input((length, 8)) for length in (6, 5)]
    encoded = keras_hub.layers.TransformerEncoder(12, 2)(texts[0])
    decoded = keras_hub.layers.TransformerDecoder(12, 2)(texts[1], encoded)
    model = keras.Model(texts, decoded)
    rng = np.random.default_rng(0)
    given = [rng.normal(size=(2, *text.shape[1:])) for text in texts]
    before = numpy(model(given))
    keras_peft.adapt(model, METHODS["prefix"])
    assert owner(model).prefix.shape == (2, 2, 2, 2, 4)
    randomize(model)
    assert not close(model(given), before)
    with keras_peft.disabled(model):
        assert np.array_equal(numpy(model(given)), before)


def test_two_prompts_stand_before_the_embeddings_of_two_texts():
    model = adapted("bart", METHODS["two-prompts"])
    backbone, inputs, hidden = model.backbone, texts(), {}
    found = backbone(inputs)
    prompts = numpy(owner(model).prompt).reshape(2, 2, 8)
    mask = {}
    with keras_peft.disabled(model):
        for part, prompt in zip(("encoder", "decoder"), prompts, strict=True):
            words = backbone.token_embedding(inputs[f"{part}_token_ids"])
            first = np.repeat(prompt[None], len(words), axis=0)
            x = ops.concatenate([first, words], axis=1)
            x = x + getattr(backbone, f"{part}_position_embedding")(x)
            norm = getattr(backbone, f"{part}_embeddings_layer_norm")
            hidden[part] = norm(x)
            mask[part] = np.pad(
                inputs[f"{part}_padding_mask"],
                ((0, 0), (2, 0)),
                constant_values=True,
            )
        for layer in backbone.encoder_transformer_layers:
            hidden["encoder"] = layer(
                hidden["encoder"], padding_mask=mask["encoder"]
            )
        for layer in backbone.decoder_transformer_layers:
            hidden["decoder"] = layer(
                hidden["decoder"],
                hidden["encoder"],
                decoder_padding_mask=mask["decoder"],
                encoder_padding_mask=mask["encoder"],
            )
    for part, expected in hidden.items():
        assert close(found[f"{part}_sequence_output"], expected[:, 2:])


def test_two_prompts_start_from_the_same_words():
    model = causal_lm("bart")
    table = numpy(model.backbone.token_embedding.embeddings)
    keras_peft.adapt(model, keras_peft.PromptTuning(3, [4, 7], decoder=True))
    expected = table[[4, 7, 4, 4, 7, 4]]
    assert np.array_equal(numpy(owner(model).prompt), expected)


# -- Masks and caches --------------------------------------------------------


@pytest.mark.parametrize("family, method", TABLE)
def test_padding_and_later_words_change_nothing(family, method):
    model = adapted(family, method)
    inputs = texts()
    expected = numpy(model(inputs))
    other = {key: value.copy() for key, value in inputs.items()}
    other["encoder_token_ids"][-1, 3:] = 1
    other["decoder_token_ids"][-1, 3:] = 1
    seen = inputs["decoder_padding_mask"]
    assert close(numpy(model(other))[seen], expected[seen])
    other["decoder_token_ids"][:, 3:] = 2
    found = numpy(model(other))
    assert close(found[:, :3], expected[:, :3])
    assert not close(found[:-1, 3:], expected[:-1, 3:])
    short = {key: value[-1:, :3] for key, value in inputs.items()}
    assert close(model(short), expected[-1:, :3])


@pytest.mark.parametrize("family, method", TABLE)
def test_generate_is_greedy_over_the_outputs(family, method):
    model = causal_lm(family)
    base, expected = generated(model, "decoder_")
    assert np.array_equal(base, expected)
    before = numpy(model(texts()))
    keras_peft.adapt(model, method)
    randomize(model, scale=3.0)
    found, expected = generated(model, "decoder_")
    assert np.array_equal(found, expected)
    assert not close(model(texts()), before)
    with keras_peft.disabled(model):
        assert np.array_equal(generated(model, "decoder_")[0], base)
        assert np.array_equal(numpy(model(texts())), before)


# -- Training and files ------------------------------------------------------


@pytest.mark.parametrize("family, method", TABLE)
def test_every_learned_number_moves_and_no_other(family, method):
    model = adapted(family, method, scale=0.1)
    learned = {id(v) for v in model.trainable_variables}
    others = [v for v in model.variables if id(v) not in learned]
    before, trained = values(others), values(model.trainable_variables)
    fit(model)
    assert same_bits(before, values(others))
    for path, value in values(model.trainable_variables).items():
        # Also the keys and values of each attention.
        assert (value != trained[path]).any(axis=-1).all(), path


@pytest.mark.filterwarnings("ignore:.compile... was not called as part")
@pytest.mark.parametrize("family, method", TABLE)
def test_files_bring_the_outputs_back(family, method, tmp_path):
    model = adapted(family, method)
    expected = numpy(model(texts()))
    keras_peft.save_adapter(model, tmp_path / "adapter")
    other = causal_lm(family)
    keras_peft.load_adapter(other, tmp_path / "adapter")
    assert np.array_equal(numpy(other(texts())), expected)
    model.save(tmp_path / "model.keras")
    other = keras.models.load_model(tmp_path / "model.keras")
    assert np.array_equal(numpy(other(texts())), expected)
    assert len(other.trainable_variables) == len(model.trainable_variables)
    with keras_peft.disabled(model):
        expected = numpy(model(texts()))
    keras_peft.remove(model)
    assert np.array_equal(numpy(model(texts())), expected)


@pytest.mark.parametrize(
    "name, message",
    [
        ("prefix", "an encoder has no prefix"),
        ("two-prompts", "no prompt before the text of a decoder"),
    ],
)
def test_what_peft_does_not_compute_is_not_written(name, message, tmp_path):
    model = adapted("bart", METHODS[name])
    with pytest.raises(ValueError, match=message):
        keras_peft.save_adapter(model, tmp_path / "adapter", format="peft")
    assert not any(tmp_path.iterdir())


# -- Errors ------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, method, message",
    [
        ("whisper", keras_peft.PrefixTuning(2), "encoder_features"),
        ("bart", keras_peft.PrefixTuning(8), "leaves no room"),
        ("gpt2", keras_peft.PromptTuning(2, decoder=True), "no encoder-decod"),
    ],
)
def test_what_does_not_fit_is_refused(family, method, message):
    model = BACKBONES[family].build()
    with pytest.raises(ValueError, match=message):
        keras_peft.adapt(model, method)
    assert not adapter_state.is_adapted(model)
