"""Adapters that cannot be merged are exported as part of the graph."""

import exported
import keras
import model_table
import numpy as np
import pytest
from test_build import check_every_promise
from test_build import run

import keras_peft
from keras_peft import adapter_state
from keras_peft import export
from keras_peft.export.adapters import adapter_problems
from keras_peft.export.comparison import reference_outputs
from keras_peft.export.samples import make_batch
from keras_peft.export.signature import read_signature


def adapted(model, method, name="default"):
    """`model` with an adapter that moves its outputs."""
    keras_peft.adapt(model, method, name=name)
    rng = np.random.default_rng(1)
    for leaf in adapter_state.leaves(model, name).values():
        for variable in leaf.learned:
            noise = rng.normal(scale=0.5, size=variable.shape)
            variable.assign(keras.ops.convert_to_numpy(variable) + noise)
    return model


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """An adapted classifier and its int8 folder."""
    model = exported.tiny_classifier()
    adapted(model, keras_peft.BottleneckAdapter(4, placement="parallel"))
    folder = tmp_path_factory.mktemp("adapted") / "tiny"
    export.to_onnx(model, folder, "int8", exported.TEXTS)
    return model, folder


def test_a_folder_of_an_adapted_classifier_computes_what_keras_does(classifier):
    model, folder = classifier
    float32, int8 = exported.read(folder, "report.json")["steps"][-2:]
    assert float32["relative"] <= 1e-5
    # 8 bits: a wrong graph of random weights has a cosine near 0.
    assert int8["cosine"] > 0.95
    assert len(export.verify(folder, model, exported.TEXTS).steps) == 2
    keras_peft.set_adapter(model, {"default": 3.0})
    with pytest.raises(ValueError, match="exported from these weights"):
        export.verify(folder, model, exported.TEXTS)
    keras_peft.set_adapter(model, "default")


@pytest.mark.parametrize(
    "name, method",
    [
        ("gpt2", keras_peft.ReFT(2, 2)),
        ("bert_classifier", keras_peft.ReFT(2, 1, 2, "direft")),
        pytest.param(
            "vit_classifier", keras_peft.AdapterPlus(2), marks=pytest.mark.slow
        ),
        pytest.param(
            "bert_classifier",
            keras_peft.PromptTuning(4),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "gpt2", keras_peft.PrefixTuning(4), marks=pytest.mark.slow
        ),
        pytest.param(
            "bert_classifier",
            keras_peft.Compacter(8, 4),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_graph_equals_the_adapted_model_on_other_shapes(name, method):
    model = adapted(model_table.make(name), method)
    result = check_every_promise(model)
    assert not result.notes
    signature = read_signature(model)
    batch = make_batch(model, signature, dict(batch=5, sequence=7), seed=9)
    (found,) = run(result.float_model, batch)
    (wanted,) = reference_outputs(model, signature, batch)
    bound = result.verification[0].tolerance * np.abs(wanted).max()
    assert np.abs(found - wanted).max() <= bound
    with keras_peft.disabled(model):
        (base,) = reference_outputs(model, signature, batch)
    assert np.abs(base - wanted).max() > bound


def test_adapters_that_can_be_merged_must_be():
    def problem(model):
        (found,) = adapter_problems(model)
        return found

    model = model_table.make("bert_classifier")
    assert adapter_problems(model) == []
    adapted(model, keras_peft.LoRA(2), "lora")
    assert "Call `keras_peft.merge(model)` first" in problem(model)
    adapted(model, keras_peft.BottleneckAdapter(2), "deep")
    assert "inactive adapters ['lora']" in problem(model)
    keras_peft.set_adapter(model, ["lora", "deep"])
    assert "mergeable ['lora'], others ['deep']" in problem(model)
    with keras_peft.disabled(model):
        assert "inactive adapters ['lora', 'deep']" in problem(model)
    keras_peft.remove(model, "lora")
    keras_peft.set_adapter(model, "deep")
    assert adapter_problems(model) == []


def test_texts_have_room_beside_what_adapters_take(tmp_path):
    model = adapted(exported.tiny_classifier(), keras_peft.PromptTuning(4))
    with pytest.raises(ValueError, match="sequence_length = 20"):
        export.to_onnx(model, tmp_path / "tiny")


def test_a_model_that_must_be_merged_is_not_verified(classifier):
    _, folder = classifier
    model = adapted(exported.tiny_classifier(), keras_peft.LoRA(2))
    with pytest.raises(ValueError, match="carries adapters"):
        export.verify(folder, model)
