"""Laws of packed rows: sequences compute what they do alone in a row."""

import contextlib

import keras
import numpy as np
import pytest
from models import build
from models import same_bits
from models import values
from table import randomize
from zoo import causal

import keras_peft
from keras_peft import layer_tree
from keras_peft import training
from keras_peft.training import segments
from keras_peft.training.packing import best_fit

BACKEND = keras.config.backend()
CASES = {case.name: case for case in causal.CASES}
FAMILIES = [
    f"{family}CausalLM"
    for family in (
        *("Bloom", "Falcon", "GPT2", "GPTNeoX", "OPT", "Llama", "Llama3"),
        *("Mistral", "Phi3", "Qwen", "Qwen3", "SmolLM3", "Gemma", "Gemma3"),
        *("Mixtral", "GptOss", "QwenMoe", "Qwen3Moe"),
    )
]
# Learned positions; a window; positions counted from the padding mask.
SLICE = ("GPT2CausalLM", "MistralCausalLM", "FalconCausalLM")
METHODS = {
    "lora": keras_peft.LoRA(2),
    "dora": keras_peft.LoRA(2, decompose=True),
    "ia3": keras_peft.IA3(),
    "bottleneck": keras_peft.BottleneckAdapter(4),
    "norms": keras_peft.NormTuning(),
}
LENGTH = 12


def sliced(names):
    return [
        pytest.param(name, marks=pytest.mark.slice) if name in SLICE else name
        for name in names
    ]


def texts():
    """`(sequences, weights of their tokens)`: more than a window each."""
    rng = np.random.default_rng(0)
    lengths = (7, 3, 5, 2, 6, 8, 1)
    sequences = [rng.integers(1, 50, length).tolist() for length in lengths]
    weights = [rng.uniform(0, 2, length).tolist() for length in lengths]
    return sequences, weights


def packed():
    return training.pack(texts()[0], LENGTH, texts()[1])


def one_per_row():
    """The same sequences in rows as long, so that sums have as many terms."""
    rows = [
        training.pack([tokens], LENGTH, [weights])
        for tokens, weights in zip(*texts(), strict=True)
    ]
    return keras.tree.map_structure(lambda *each: np.concatenate(each), *rows)


def by_sequence(batch, outputs):
    """`{tokens of a sequence: outputs at them}`."""
    tokens, numbers = batch[0]["token_ids"], batch[0]["padding_mask"]
    return {
        tuple(tokens[row, numbers[row] == n]): outputs[row, numbers[row] == n]
        for row in range(len(tokens))
        for n in range(1, numbers[row].max() + 1)
    }


def adapted(name, method="lora"):
    model = CASES[name].build()
    for _, layer in layer_tree.walk(model):
        # Qwen balances what its experts get of padding too.
        if hasattr(layer, "router_aux_loss_coefficient"):
            layer.router_aux_loss_coefficient = 0.0
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    keras_peft.adapt(model, METHODS[method])
    randomize(model)
    return model


def computed(model, inputs):
    return keras.ops.convert_to_numpy(model(inputs, training=False))


def same_numbers(found, expected, terms=2**8, rounding=0.0):
    # Float32, through a few hundred sums: 2**-24 of the largest for each.
    atol = 2.0**-24 * terms * np.abs(expected).max() + rounding
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@contextlib.contextmanager
def refused(said):
    with pytest.raises(ValueError) as caught:
        yield
    # In Keras' form.
    assert said in str(caught.value) and "Received: " in str(caught.value)


def replaced_names(model):
    layers = layer_tree.layers_by_path(model).values()
    return [
        name
        for layer in layers
        for name in vars(layer).get("replaced_methods", ())
    ]


# -- The model ---------------------------------------------------------------


@pytest.mark.parametrize("name", sliced(FAMILIES))
def test_outputs_are_those_of_each_sequence_alone(name):
    model = training.separate_segments(adapted(name))
    ours, alone = (
        by_sequence(batch, computed(model, batch[0]))
        for batch in (packed(), one_per_row())
    )
    assert ours.keys() == alone.keys() and len(ours) == len(texts()[0])
    for tokens, expected in alone.items():
        same_numbers(ours[tokens], expected)


@pytest.mark.parametrize("name", sliced(FAMILIES))
def test_other_batches_compute_what_they_did(name):
    model = adapted(name)
    inputs = one_per_row()[0]
    inputs["padding_mask"][1] = [0] * 4 + [1] * 6 + [0] * 2
    inputs["padding_mask"][2] = [1] * 3 + [0] + [1] * 8
    before = computed(model, inputs)
    training.separate_segments(model)
    assert computed(model, inputs).tobytes() == before.tobytes()


def trained(model, batch):
    """`(loss, changes of what trains, loss and accuracy then)` of one step."""
    x, y, sample_weight = batch
    model.compile(
        # The change of a weight is its gradient.
        keras.optimizers.SGD(1.0),
        keras.losses.SparseCategoricalCrossentropy(True, reduction="sum"),
        weighted_metrics=["accuracy"],
    )
    before = list(values(model.trainable_variables).values())
    settings = dict(sample_weight=sample_weight, batch_size=len(y), verbose=0)
    history = keras.Model.fit(model, x, y, **settings).history
    after = values(model.trainable_variables).values()
    evaluated = keras.Model.evaluate(model, x, y, **settings)
    changes = [b - a for a, b in zip(before, after, strict=True)]
    return history["loss"], changes, evaluated


def same_training(name, method, **settings):
    model = training.prepare(adapted(name, method), packing=True, **settings)
    found = trained(model, packed())
    expected = trained(adapted(name, method), one_per_row())
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        # Gradients go through the sums of both passes. Weights are about one,
        # and so is the rounding of their change.
        same_numbers(ours, theirs, terms=2**10, rounding=2.0**-22)
    assert max(np.abs(change).max() for change in expected[1]) > 2.0**-10
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-3)


@pytest.mark.parametrize("name", sliced(FAMILIES))
def test_losses_and_gradients_are_those_of_each_sequence_alone(name):
    same_training(name, "lora", loss=None)


@pytest.mark.parametrize("name", ["GPT2CausalLM", "LlamaCausalLM"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_packed_rows(name, method):
    same_training(name, method, remat="full", chunk_size=5)


@pytest.mark.slice
@pytest.mark.skipif(BACKEND != "jax", reason="for JAX")
def test_causal_attention_keeps_sequences_apart():
    same_training("GPT2CausalLM", "lora", attention="causal", remat="dots")
    same_training("LlamaCausalLM", "lora", attention="causal")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_rounding_is_no_reason_to_refuse(dtype):
    before = keras.config.dtype_policy()
    if dtype != "int8":
        keras.config.set_dtype_policy(dtype)
    try:
        model = CASES["GemmaCausalLM"].build()
    finally:
        keras.config.set_dtype_policy(before)
    if dtype == "int8":
        for _, layer in layer_tree.walk(model):
            if isinstance(layer, keras.layers.EinsumDense):
                layer.quantize(dtype)
    training.separate_segments(model)


def test_generated_texts_and_files_are_as_before(tmp_path):
    model = build("gpt2")
    model.compile(sampler="greedy")
    prompt = {
        "token_ids": np.array([[3, 5, 0, 0, 0, 0]]),
        "padding_mask": np.array([[1, 1, 0, 0, 0, 0]]),
    }
    before = model.generate(prompt, stop_token_ids=None)["token_ids"]
    config = keras.saving.serialize_keras_object(model)
    training.separate_segments(model)
    after = model.generate(prompt, stop_token_ids=None)["token_ids"]
    assert np.array_equal(after, before)
    assert keras.saving.serialize_keras_object(model) == config
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    assert not replaced_names(loaded)
    assert same_bits(values(loaded.variables), values(model.variables))


@pytest.mark.slice
def test_it_is_undone_and_adapters_come_and_go():
    model = build("gpt2")
    layers = layer_tree.layers_by_path(model).values()
    attributes = [set(vars(layer)) for layer in layers]
    training.separate_segments(model)
    keras_peft.adapt(model, keras_peft.LoRA(2))
    inputs = training.pack([[3, 4, 5, 6], [7, 8, 9]], 8)[0]
    apart = computed(model, inputs)
    alone = training.pack([[7, 8, 9]], 8)[0]
    same_numbers(apart[0, 4:7], computed(model, alone)[0, :3])
    keras_peft.remove(model)
    training.restore(model)
    assert [set(vars(layer)) for layer in layers] == attributes
    assert np.abs(computed(model, inputs) - apart).max() > 0.01


# -- What cannot be kept apart -----------------------------------------------


def flat():
    """A language model around the layers of a backbone, not itself."""
    backbone = build("llama").backbone
    return keras.Model(backbone.input, keras.layers.Dense(9)(backbone.output))


REFUSED = {
    "a recurrence": (CASES["Qwen3_5CausalLM"].build, "do not stay apart"),
    "no attention": (CASES["RWKV7CausalLM"].build, "no transformer blocks"),
    "other inputs": (CASES["Gemma4CausalLM"].build, "position_ids"),
    "an encoder": (lambda: build("bert-classifier"), "segment_ids"),
    "no backbone": (flat, "with a backbone"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_and_stay_as_they_are(name):
    make, said = REFUSED[name]
    model = make()
    with refused(said):
        training.prepare(model, packing=True, loss=None, attention=None)
    assert not replaced_names(model)


@pytest.mark.slice
@pytest.mark.parametrize("broken", ["_same", "_positions"])
def test_sequences_that_meet_are_noticed(broken, monkeypatch):
    def see_all(numbers):
        return numbers[:, :, None] >= numbers[:, None, :]

    def count_on(numbers):
        return keras.ops.cumsum(keras.ops.ones_like(numbers), axis=1) - 1

    model = training.prepare(build("gpt2"), remat="full", packing=True)
    before = replaced_names(model)
    wrong = {"_same": see_all, "_positions": count_on}[broken]
    monkeypatch.setattr(segments, broken, wrong)
    with refused("do not stay apart"):
        training.prepare(model, packing=True)
    assert replaced_names(model) == before


@pytest.mark.parametrize(
    "method",
    [
        keras_peft.PromptTuning(2),
        keras_peft.PTuning(2),
        keras_peft.PrefixTuning(2),
        keras_peft.ReFT(2),
    ],
    ids=lambda method: type(method).__name__,
)
def test_adapters_that_count_positions_are_refused(method):
    model = keras_peft.adapt(build("gpt2"), method)
    with refused("count the positions"):
        training.separate_segments(model)
    assert not replaced_names(model)
    later = training.separate_segments(build("gpt2"))
    keras_peft.adapt(later, method)
    with refused("count the positions"):
        later(training.pack([[3, 4, 5]], 4)[0])


# -- Rows --------------------------------------------------------------------


@pytest.mark.slice
def test_rows_hold_every_token_its_target_and_its_weight():
    sequences, weights = texts()
    x, y, sample_weight = packed()
    shape = x["token_ids"].shape
    assert shape == y.shape == sample_weight.shape == (3, LENGTH)
    targets, counts = (by_sequence((x,), each) for each in (y, sample_weight))
    for tokens, weight in zip(sequences, weights, strict=True):
        np.testing.assert_array_equal(targets[tuple(tokens)][:-1], tokens[1:])
        expected = np.float32([*weight[1:], 0.0])
        np.testing.assert_array_equal(counts[tuple(tokens)], expected)
    padding = x["padding_mask"] == 0
    assert not sample_weight[padding].any()
    assert not x["token_ids"][padding].any()
    assert padding.sum() == 3 * LENGTH - sum(map(len, sequences))


@pytest.mark.slice
def test_a_long_sequence_is_split_and_every_token_predicted_once():
    sequence = list(range(1, 12))
    for length in (2, 4, 5, 11, 12):
        x, y, sample_weight = training.pack([sequence], length, split=True)
        assert (x["padding_mask"] <= max(1, length // 2)).all()
        assert sorted(y[sample_weight > 0]) == sequence[1:]
        predicted_from = x["token_ids"][sample_weight > 0]
        np.testing.assert_array_equal(y[sample_weight > 0], predicted_from + 1)


@pytest.mark.slice
def test_little_of_the_rows_is_padding():
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 100, 2000)
    rows = best_fit(lengths.tolist(), 256)
    assert sorted(i for row in rows for i in row) == list(range(2000))
    filled = [lengths[row].sum() for row in rows]
    assert max(filled) <= 256
    # No fewer rows could hold them, but for one.
    assert len(rows) <= -(-lengths.sum() // 256) + 1


BAD = {
    "no sequences": (([], 8), "at least one"),
    "an empty sequence": (([[1], []], 8), "[[]] at [1]"),
    "no numbers": ((["text"], 8), "token numbers"),
    "a negative number": (([[1, -100]], 8), "at least 0"),
    "too long": (([[1, 2], [1, 2, 3]], 2), "the first at 1"),
    "no length": (([[1, 2]], 1), "length=1"),
    "other weights": (([[1, 2]], 8, [[1]]), "1 tokens in 1 lists, of 2 in 1"),
    "fewer weights": (([[1], [2]], 8, [[1]]), "1 lists, of 2 in 2"),
}


@pytest.mark.slice
@pytest.mark.parametrize("name", BAD)
def test_bad_sequences_are_refused(name):
    arguments, said = BAD[name]
    with refused(said):
        training.pack(*arguments)
