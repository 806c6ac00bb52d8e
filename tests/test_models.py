"""Laws of an adapted model: methods x models."""

import warnings

import keras
import numpy as np
import pytest
from models import MODELS
from models import SLICE
from models import build
from models import data
from models import fit
from models import outputs
from models import same_bits
from models import values
from table import METHODS
from table import randomize
from table import rounding

import keras_peft
from keras_peft import adapter_state

# Of LoRA's settings, those that differ in what a model sees.
CHOSEN = [
    name
    for name in METHODS
    if name in ("lora", "lora-pissa") or not name.startswith("lora")
]


def _marks(method, name):
    if method == "lora":
        return [pytest.mark.slice] * (name in SLICE)
    # The other methods share their models out among the backends.
    return [pytest.mark.slice, pytest.mark.moved] if name == "gpt2" else []


def _rows(marks):
    return [
        pytest.param(
            METHODS[method],
            name,
            id=f"{method}-{name}",
            marks=marks(method, name),
        )
        for method in CHOSEN
        for name in (MODELS if method == "lora" else METHODS[method].models)
    ]


ROWS = _rows(_marks)
# Two programs for each row: compiled for LoRA alone.
TRAINED_ON = _rows(lambda *row: _marks(*row) if row[0] == "lora" else [])
# Of products summed in other orders, over the few layers of these models:
# 32 terms a layer, 8 layers deep.
CLOSE = 32 * 8 * rounding("float32")


def base_values(model):
    own = {
        id(variable)
        for name in model.peft.adapters
        for leaf in adapter_state.leaves(model, name).values()
        for variable in leaf.variables
    }
    own |= {id(v) for v in adapter_state.head_variables(model).values()}
    return values(v for v in model.variables if id(v) not in own)


def close(a, b):
    return np.abs(a - b).max() <= CLOSE * max(1.0, np.abs(b).max())


@pytest.mark.parametrize("method, name", ROWS)
def test_a_fresh_adapter_leaves_the_model_as_it_was(method, name):
    model = build(name)
    before = outputs(model, name)
    assert keras_peft.adapt(model, method.make()) is model
    after = outputs(model, name)
    if method.exact_start and method.identity:
        assert np.array_equal(before, after)
    assert close(before, after) == method.identity


@pytest.mark.parametrize("method, name", ROWS)
def test_only_adapter_and_head_train_and_all_of_them_do(method, name):
    model = build(name)
    keras_peft.adapt(model, method.make())
    leaves = adapter_state.leaves(model, "default").values()
    expected = {id(v) for leaf in leaves for v in leaf.learned}
    expected |= {id(v) for v in model.peft.head_thawed}
    assert {id(v) for v in model.trainable_variables} == expected
    randomize(model, scale=0.1)
    trained, base = values(model.trainable_variables), base_values(model)
    fit(model, name)
    assert same_bits(base, base_values(model))
    unmoved = [
        path
        for path, value in values(model.trainable_variables).items()
        if np.array_equal(value, trained[path])
        # Softmax ignores what all keys share: no gradient in theory either.
        and "key" not in path
    ]
    assert not unmoved


@pytest.mark.parametrize("method, name", ROWS)
def test_merged_equals_adapted_and_unmerged_has_the_bits_of_the_base(
    method, name
):
    model = build(name)
    cls, before = type(model), values(model.variables)
    base_outputs = outputs(model, name)
    keras_peft.adapt(model, method.make())
    randomize(model)
    adapted = outputs(model, name)
    base = base_values(model)
    assert not close(adapted, base_outputs)
    if not method.mergeable:
        with pytest.raises(ValueError, match="cannot be merged"):
            keras_peft.merge(model)
        assert np.array_equal(outputs(model, name), adapted)
        with keras_peft.disabled(model):
            assert np.array_equal(outputs(model, name), base_outputs)
        keras_peft.remove(model)
        assert np.array_equal(outputs(model, name), base_outputs)
        return

    report = keras_peft.merge(model)
    assert (
        type(model) is cls and values(model.variables).keys() == before.keys()
    )
    assert close(outputs(model, name), adapted)
    assert 0 <= report.worst[1] < 1e-4

    keras_peft.unmerge(model)
    assert same_bits(base, base_values(model))
    assert np.array_equal(outputs(model, name), adapted)

    keras_peft.remove(model)
    assert type(model) is cls
    assert same_bits(before, values(model.variables))
    assert np.array_equal(outputs(model, name), base_outputs)


@pytest.mark.parametrize("method, name", ROWS)
def test_an_adapter_folder_brings_the_outputs_back(method, name, tmp_path):
    model = build(name)
    keras_peft.adapt(model, method.make())
    randomize(model)
    adapted = outputs(model, name)
    keras_peft.save_adapter(model, tmp_path / "adapter")
    other = build(name)
    keras_peft.load_adapter(other, tmp_path / "adapter", trainable=True)
    assert np.array_equal(outputs(other, name), adapted)
    assert len(other.trainable_variables) == len(model.trainable_variables)


@pytest.mark.parametrize("method, name", TRAINED_ON)
def test_a_loaded_adapter_trains_on_as_the_saved_one(method, name, tmp_path):
    model = build(name)
    keras_peft.adapt(model, method.make())
    randomize(model)
    keras_peft.save_adapter(model, tmp_path / "adapter")
    other = build(name)
    keras_peft.load_adapter(other, tmp_path / "adapter", trainable=True)
    assert fit(other, name, epochs=1) == pytest.approx(
        fit(model, name, epochs=1), rel=CLOSE
    )


# keras-hub's tasks compile themselves, and Keras says so at every load.
@pytest.mark.filterwarnings("ignore:.compile... was not called as part")
@pytest.mark.parametrize("method, name", ROWS)
def test_a_keras_file_brings_the_adapted_model_back(method, name, tmp_path):
    model = build(name)
    keras_peft.adapt(model, method.make())
    randomize(model)
    adapted = outputs(model, name)
    model.save(tmp_path / "model.keras")
    other = keras.models.load_model(tmp_path / "model.keras")
    assert np.array_equal(outputs(other, name), adapted)
    trained = len(model.trainable_variables)
    assert len(other.trainable_variables) == trained
    if method.mergeable:
        keras_peft.merge(other)
        assert close(outputs(other, name), adapted)


@pytest.mark.parametrize("name", MODELS)
def test_weights_files_go_both_ways(name, tmp_path):
    model = build(name)
    keras_peft.adapt(model, keras_peft.LoRA(rank=2))
    randomize(model)
    adapted = outputs(model, name)
    model.save_weights(tmp_path / "adapted.weights.h5")
    other = build(name)
    keras_peft.adapt(other, keras_peft.LoRA(rank=2))
    other.load_weights(tmp_path / "adapted.weights.h5")
    assert np.array_equal(outputs(other, name), adapted)
    # Not in silence: the base alone would be another model.
    with warnings.catch_warnings(), pytest.raises(ValueError):
        warnings.simplefilter("ignore")
        build(name).load_weights(tmp_path / "adapted.weights.h5")


@pytest.mark.slice
@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_generate_is_greedy_over_the_adapted_logits(name):
    model = build(name)
    model.compile(sampler="greedy")
    keras_peft.adapt(model, keras_peft.LoRA(rank=2))
    randomize(model, scale=1.0)
    prompt = data(name, samples=2)[0]
    prompt = {key: value[:, :6].copy() for key, value in prompt.items()}
    prompt["padding_mask"][:, 3:] = False
    prompt["token_ids"][:, 3:] = 0
    expected = prompt["token_ids"].copy()
    for position in range(3, 6):
        mask = np.arange(6)[None] < position
        inputs = {
            "token_ids": expected,
            "padding_mask": np.repeat(mask, 2, axis=0),
        }
        logits = keras.ops.convert_to_numpy(model(inputs))
        expected[:, position] = logits[:, position - 1].argmax(-1)
    for merged in (False, True):
        if merged:
            keras_peft.merge(model)
        generated = model.generate(prompt, stop_token_ids=None)
        assert np.array_equal(generated["token_ids"], expected)


@pytest.mark.slice
def test_batch_normalization_keeps_its_statistics():
    model = build("convolutional")
    norm = model.layers[2]
    before = values(norm.variables)
    keras_peft.adapt(model, keras_peft.LoRA(rank=2))
    fit(model, "convolutional")
    assert same_bits(before, values(norm.variables))
    keras_peft.remove(model)
    assert norm.trainable and len(norm.trainable_variables) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16", "float16"])
@pytest.mark.parametrize("name", ["functional", "bert-classifier"])
def test_half_precision_bases_keep_and_regain_their_bits(dtype, name):
    on_jax = keras.backend.backend() == "jax"
    if on_jax and (dtype, name) == ("float16", "bert-classifier"):
        pytest.skip("JAX has no float16 attention on processors")
    keras.config.set_dtype_policy(dtype)
    try:
        model = build(name)
    finally:
        keras.config.set_dtype_policy("float32")
    before = values(model.variables)
    keras_peft.adapt(model, keras_peft.LoRA(rank=2))
    for leaf in adapter_state.leaves(model, "default").values():
        assert {v.dtype for v in leaf.variables} == {"float32"}
    base = base_values(model)
    fit(model, name, epochs=1)
    assert same_bits(base, base_values(model))
    randomize(model, scale=0.01)
    adapted = outputs(model, name).astype("float32")
    report = keras_peft.merge(model)
    merged = outputs(model, name).astype("float32")
    # One rounding of each kernel entry, 8 layers deep.
    limit = 8 * 16 * rounding(dtype) * max(1.0, np.abs(adapted).max())
    assert np.abs(merged - adapted).max() <= limit
    # A change of a hundredth is near the rounding of half precision: the
    # report says how much of it the kernels hold.
    assert (report.worst[1] > 1e-3) == (dtype != "mixed_bfloat16")
    keras_peft.unmerge(model)
    assert same_bits(base, base_values(model))
    keras_peft.remove(model)
    assert same_bits(before, values(model.variables))


def test_a_model_around_an_adapted_backbone_trains_and_saves(tmp_path):
    backbone = build("bert-backbone")
    keras_peft.adapt(backbone, keras_peft.LoRA(rank=2))
    hidden = backbone(backbone.input)["pooled_output"]
    model = keras.Model(backbone.input, keras.layers.Dense(3)(hidden))
    base = base_values(backbone)
    fit(model, "own-classifier")
    assert same_bits(base, base_values(backbone))
    model.save(tmp_path / "model.keras")
    other = keras.models.load_model(tmp_path / "model.keras")
    expected = outputs(model, "own-classifier")
    assert np.array_equal(outputs(other, "own-classifier"), expected)


def test_cloning_an_adapted_model_gives_an_adapted_model_or_an_error():
    for name in ("functional", "sequential"):
        model = build(name)
        keras_peft.adapt(model, keras_peft.LoRA(rank=2))
        try:
            clone = keras.models.clone_model(model)
        except ValueError as error:
            assert "keras_peft.merge" in str(error)
        else:
            assert len(clone.trainable_variables) == len(
                model.trainable_variables
            )
            clone.set_weights(model.get_weights())
            assert np.array_equal(outputs(clone, name), outputs(model, name))
