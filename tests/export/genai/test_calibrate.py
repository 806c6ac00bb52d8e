"""Integers chosen by calibration, and those that trained, on their way."""

import json
import re

import keras
import numpy as np
import onnx
import pytest
from described import VOCABULARY
from described import build
from stepping import Stepping

import keras_peft
from keras_peft import quantize_aware
from keras_peft.calibration import observe
from keras_peft.export.blockwise import quantize
from keras_peft.export.genai import families
from keras_peft.export.genai import graph
from keras_peft.export.genai.calibrate import EXTRA
from keras_peft.export.genai.calibrate import calibrated
from keras_peft.export.genai.calibrate import calibration_rows
from keras_peft.export.genai.compare import Scores
from keras_peft.export.genai.decoder import Linear
from keras_peft.export.genai.decoder import parts
from keras_peft.export.genai.observed import Observed
from keras_peft.export.genai.plan import LAYER_BLOCKS
from keras_peft.export.genai.plan import plan_storage
from keras_peft.export.genai.storage import Float
from keras_peft.export.genai.verdict import warning
from keras_peft.export.report import ExportReport
from keras_peft.layer_tree import walk
from keras_peft.merge import as_base

ROWS = np.random.default_rng(0).integers(1, VOCABULARY, (4, 32))
NAMES = pytest.mark.parametrize("name", ["llama_tied", "gpt2"])


def _inputs(rows):
    return {"token_ids": rows, "padding_mask": np.ones_like(rows)}


def _linear(decoder):
    head = decoder.head
    return [p for p in parts(decoder, Linear) if p is not head]


def _losses(decoder, plan, folder):
    """Divergence from the float32 graph, on rows of another draw."""
    rows = np.random.default_rng(1).integers(1, VOCABULARY, (4, 32))
    logits = []
    for name, stored in (("float", {}), ("stored", plan)):
        (folder / name).mkdir(parents=True)
        graph.save(graph.build(decoder, stored), folder / name)
        run = Stepping(folder / name / "model.onnx")
        logits.append(run(rows, sizes=(32,)).astype("float64"))
    exact, found = (
        x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in logits
    )
    return (np.exp(exact) * (exact - found)).sum(axis=-1).mean()


@NAMES
def test_the_graph_reads_what_the_layers_of_keras_read(tmp_path, name):
    model = build(name)
    decoder = families.describe(model)
    observed = Observed(decoder, 64, tmp_path)
    grams = observed.grams(ROWS)
    layers = {part.path for part in _linear(decoder)}
    layers = {p: la for p, la in walk(model) if p in layers}
    seen = observe(model, layers, _inputs(ROWS))
    keys = {key for found in observed.keys.values() for key in found}
    assert keys == {part.key for part in _linear(decoder)}
    for kernel, found in observed.keys.items():
        for key in found:
            expected = seen[key.partition(":")[0]]
            expected = expected.gram / expected.count
            gram = grams[observed.inputs[kernel]]
            # Two float32 evaluations of the layers before, both squared.
            tolerance = 1e-4 * np.abs(expected).max()
            assert np.abs(gram - expected).max() <= tolerance


@NAMES
@pytest.mark.parametrize("bits", [4, 8])
def test_calibration_loses_less_than_the_nearest(tmp_path, name, bits):
    decoder = families.describe(build(name))
    found = calibrated(decoder, ROWS, 64, {}, bits)
    assert found.keys() == {part.key for part in _linear(decoder)}
    block = LAYER_BLOCKS[bits]
    rounded = {p.key: quantize(p.kernel, bits, block) for p in _linear(decoder)}
    # The table is left in float32: it would be most of what 8 bits lose.
    table = {decoder.table.key: Float()}
    nearest, ours = {**rounded, **table}, {**found, **table}
    losses = [
        _losses(decoder, plan, tmp_path / str(n))
        for n, plan in enumerate((nearest, ours))
    ]
    # At 8 bits the nearest is near: there is less to gain.
    assert losses[1] < {4: 0.7, 8: 0.9}[bits] * losses[0]
    # Grids with zero points, and a little more where it helps.
    least = sum(
        part.kernel.size * bits / 8 + (4 + bits / 8) * part.kernel.size / 32
        for part in _linear(decoder)
    )
    total = sum(stored.nbytes for stored in found.values())
    assert total <= (1 + EXTRA) * least


def test_what_is_fixed_already_is_left_alone():
    decoder = families.describe(build("llama"))
    first = _linear(decoder)[0]
    fixed = {first.key: quantize(first.kernel, 4)}
    found = calibrated(decoder, ROWS, 64, fixed)
    # With it, those that share its operator.
    assert first.key not in found and found
    plan = plan_storage(decoder, "int4", {**found, **fixed})
    assert plan[first.key] is fixed[first.key]


# -- Integers that trained ---------------------------------------------------


def _trained(name, kind):
    model = build(name)
    keras.utils.set_random_seed(0)
    keras_peft.adapt(
        model,
        keras_peft.LoRA(rank=4),
        quantize_aware=kind,
        calibration=_inputs(ROWS),
    )
    model.compile(
        keras.optimizers.Adam(1e-2),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    keras.Model.fit(
        model, _inputs(ROWS), np.roll(ROWS, -1, axis=1), epochs=3, verbose=0
    )
    return model


def _weights(folder):
    model = onnx.load(folder / "model.onnx")
    return {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
    }


# Llama keeps query, key and value in layers of their own, Falcon in one.
@pytest.mark.parametrize("name", ["llama_tied", "falcon"])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_the_integers_that_trained_are_the_ones_that_ship(tmp_path, name, kind):
    model = _trained(name, kind)
    trained = quantize_aware.integers(model)
    keras_peft.merge(model)
    keras_peft.export.to_genai(
        model, tmp_path / "app", quantize=kind, context_length=64
    )
    weights = _weights(tmp_path / "app")
    shipped = {
        array.tobytes()
        for array_name, tensor in weights.items()
        if array_name.endswith(".values")
        for array in tensor  # One output at a time: operators join layers.
    }
    assert trained
    for stored in trained.values():
        for output in stored.tensors()["B"]:
            assert output.tobytes() in shipped
    scales = np.concatenate(
        [w.ravel() for n, w in weights.items() if n.endswith(".scales")]
    )
    for stored in trained.values():
        assert np.isin(stored.scales, scales).all()


# -- Texts -------------------------------------------------------------------


@pytest.mark.parametrize(
    "texts, message",
    [
        ("one text", "is a list of texts"),
        ([3], "is a list of texts"),
        ([], "`calibration` has 0 tokens"),
        (["a b"], "is the least"),
    ],
)
def test_texts_that_say_nothing_are_refused(tmp_path, texts, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        calibration_rows(texts, _tokenizer(tmp_path), 64)


def test_rows_are_spread_over_all_texts(tmp_path):
    tokenizer = _tokenizer(tmp_path)
    texts = ["a " * 3200, "b " * 3200]
    rows = calibration_rows(texts, tokenizer, 64)
    assert rows.shape == (24, 64)
    assert np.all(rows[:12] == rows[0]) and np.all(rows[12:] == rows[-1])
    assert rows[0, 0] != rows[-1, 0]


def _tokenizer(folder):
    import tokenizers

    model = tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


# -- The verdict -------------------------------------------------------------


def _scores(mean):
    losses = np.random.default_rng(0).normal(mean, 0.1, 400)
    return Scores(losses, np.zeros(400, int))


def test_a_loss_beyond_the_gain_is_the_first_thing_said():
    base, tuned = _scores(3.0), _scores(2.9)
    assert warning("int4", base, tuned, _scores(2.95)) == ""
    assert warning("int4", None, tuned, _scores(9.0)) == ""
    text = warning("int4", base, tuned, _scores(3.2))
    assert text.startswith("WARNING: int4 costs more than fine-tuning gained")
    assert "by 0.3000 ±" in text and "by 0.1000." in text
    report = ExportReport("m", (), warning=text)
    assert str(report).splitlines()[0] == text
    assert json.loads(json.dumps(report.to_dict()))["warning"] == text


def test_a_worse_tuned_model_has_gained_nothing():
    text = warning("int8", _scores(2.8), _scores(2.9), _scores(2.95))
    assert "costs more" in text


def test_the_base_is_asked_what_it_knew():
    model = build("llama")
    rows = ROWS[:1]
    before = keras.ops.convert_to_numpy(model(_inputs(rows)))
    keras_peft.adapt(model, keras_peft.LoRA(rank=2, init="gaussian"))
    for _, layer in keras_peft.layer_tree.adapted_layers(model):
        for leaf in layer.adapters.values():
            leaf.lora_kernel_b.assign(leaf.lora_kernel_b + 0.1)
    keras_peft.merge(model)
    after = keras.ops.convert_to_numpy(model(_inputs(rows)))
    with as_base(model) as is_merged:
        assert is_merged
        base = keras.ops.convert_to_numpy(model(_inputs(rows)))
        assert np.array_equal(base, before)
    again = keras.ops.convert_to_numpy(model(_inputs(rows)))
    assert np.array_equal(again, after) and not np.array_equal(after, before)
