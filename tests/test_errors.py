"""Every error a user can cause: its words, and that nothing was changed.

Damaged and hostile adapter folders, full disks and kills have their table in
`test_adapter_io.py`, folders of Hugging Face PEFT theirs in
`interop/test_peft_errors.py`, arguments of an export in `export/`. Two methods
on one layer are no error: `test_two_methods.py`.
"""

import contextlib
import importlib.util
import subprocess
import sys

import keras
import numpy as np
import pytest
from models import build
from models import outputs
from models import same_bits
from models import values
from table import randomize

import keras_peft
from keras_peft import LoRA

NAME = "bert-classifier"


@contextlib.contextmanager
def refused(model, *words, error=ValueError):
    """Within, `error` is raised in Keras' form and `model` keeps its bits."""
    before, cls = values(model.variables), type(model)
    trained = [v.path for v in model.trainable_variables]
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert "Received: " in message
    for word in words:
        assert word in message, message
    assert same_bits(before, values(model.variables)) and type(model) is cls
    assert trained == [v.path for v in model.trainable_variables]


def adapted(name=NAME):
    model = build(name)
    keras_peft.adapt(model, LoRA(2))
    randomize(model)
    return model


SETTINGS = {
    "rank 0": (dict(rank=0), "positive integer"),
    "rank 1.5": (dict(rank=1.5), "positive integer"),
    "rank True": (dict(rank=True), "positive integer"),
    "pattern rank": (dict(rank_pattern={"query": 0}), "positive integer"),
    "alpha 0": (dict(alpha=0), "`alpha` must be a positive"),
    "dropout 1": (dict(dropout=1.0), "`dropout` must lie"),
    "scaling": (dict(scaling="rs"), "'rank_stabilized'"),
    "init": (dict(init="loftq2"), "'pissa'"),
    "odd orthogonal": (dict(rank=3, init="orthogonal"), "even rank"),
    "bad expression": (dict(rank_pattern={"(": 2}), "does not parse"),
    "bias of DoRA": (dict(use_bias=True, decompose=True), "do not go together"),
}


@pytest.mark.parametrize("settings, words", SETTINGS.values(), ids=SETTINGS)
def test_settings(settings, words):
    with pytest.raises(ValueError, match="Received: ") as caught:
        LoRA(**settings)
    assert words in str(caught.value)


METHODS = {
    "block of 1": (lambda: keras_peft.OFT(block_size=1), "2 or more"),
    "block 0": (lambda: keras_peft.BOFT(block_size=0), "positive integer"),
    "blocks 0": (lambda: keras_peft.OFT(num_blocks=0), "positive integer"),
    "cayley": (lambda: keras_peft.OFT(cayley="series"), "'neumann' or"),
    "two terms": (lambda: keras_peft.OFT(terms=2), "4 or more"),
    "factors 0": (lambda: keras_peft.BOFT(num_factors=0), "positive integer"),
    "odd reflections": (lambda: keras_peft.HRA(rank=3), "must be even"),
    "variant": (lambda: keras_peft.RoAd(variant=3), "1, 2 or 4"),
    "odd group": (lambda: keras_peft.RoAd(group_size=3), "must be even"),
    "bad pattern": (lambda: keras_peft.IA3(feedforward="("), "does not parse"),
    "no tokens": (lambda: keras_peft.TokenTuning([]), "at least one"),
    "token twice": (lambda: keras_peft.TokenTuning([2, 5, 2]), "[2]"),
    "token -1": (lambda: keras_peft.TokenTuning([-1]), "at least 0"),
    "token 1.5": (lambda: keras_peft.TokenTuning([1.5]), "integer"),
}


@pytest.mark.parametrize("make, words", METHODS.values(), ids=METHODS)
def test_settings_of_other_methods(make, words):
    with pytest.raises(ValueError, match="Received: ") as caught:
        make()
    assert words in str(caught.value)


MISFITS: dict[str, tuple] = {
    "blocks": (keras_peft.OFT(), None, "blocks of 32", "block_size=2, 4, 8"),
    "block count": (keras_peft.OFT(num_blocks=3), None, "num_blocks=1, 2, 4"),
    "butterfly": (
        keras_peft.BOFT(block_size=8, num_factors=2),
        None,
        "multiple of 2 blocks",
        "block_size=2, 4",
    ),
    "groups": (keras_peft.RoAd(), None, "groups of 64", "group_size=2, 4, 8"),
    "token": (keras_peft.TokenTuning([3, 20]), None, "no tokens 20"),
    "pattern": (keras_peft.IA3(feedforward=["ffn"]), None, "'ffn'"),
    "tokens of a kernel": (keras_peft.TokenTuning([3]), "query", "'query'"),
    "rotated tokens": (keras_peft.HRA(), "token_embedding", "No layer of"),
    "no bias": (keras_peft.BiasTuning(), "token_embedding", "No layer of"),
    "bias of tokens": (
        LoRA(2, use_bias=True),
        ["query", "token_embedding"],
        "1 of 3 layers",
        "it has no bias",
    ),
}


@pytest.mark.parametrize(
    "method, targets, words",
    [pytest.param(*row[:2], row[2:], id=name) for name, row in MISFITS.items()],
)
def test_adapt_with_a_method_that_does_not_fit(method, targets, words):
    model = build(NAME)
    with refused(model, *words):
        keras_peft.adapt(model, method, targets)


def test_adapt_without_blocks_or_norms():
    model = build("functional")
    with refused(model, "no transformer blocks"):
        keras_peft.adapt(model, keras_peft.IA3())
    with refused(model, "adapts by default", "can be adapted: none"):
        keras_peft.adapt(model, keras_peft.NormTuning())


ADAPTS: dict[str, tuple] = {
    "no target": (dict(targets="q_proj"), "No layer of", "'query' (x2)"),
    "typo": (dict(targets=["query", "valeu"]), "Did you mean 'value'?"),
    "wrong group": (dict(targets="attentions"), "'attention'"),
    "empty targets": (dict(targets=[]), "an empty list"),
    "bad expression": (dict(targets="("), "does not parse"),
    "no convolutions": (dict(targets="convolutions"), "Groups: "),
    "unknown head": (dict(head="classifier"), "head="),
    "empty name": (dict(name=""), "`name` must be"),
}


@pytest.mark.parametrize(
    "arguments, words",
    [pytest.param(row[0], row[1:], id=name) for name, row in ADAPTS.items()],
)
def test_adapt(arguments, words):
    model = build(NAME)
    with refused(model, *words):
        keras_peft.adapt(model, LoRA(2), **arguments)


def test_adapt_names_every_layer_whose_kernel_is_too_small():
    model = build(NAME)
    with refused(model, "12 of 12 layers", "rank 9 is larger", "[8, 16]"):
        keras_peft.adapt(model, LoRA(9))


def test_adapt_names_a_pattern_that_matches_nothing():
    model = build(NAME)
    with refused(model, "querry", "Did you mean 'query'?"):
        keras_peft.adapt(model, LoRA(2, rank_pattern={"querry": 4}))


def test_adapt_an_unbuilt_model():
    model = keras.Sequential([keras.layers.Dense(3)])
    with refused(model, "has no weights yet", "Call it on a batch"):
        keras_peft.adapt(model, LoRA(2))


def test_adapt_what_is_no_model_or_no_method():
    model = build("functional")
    with refused(model, "settings of a method", error=TypeError):
        keras_peft.adapt(model, "lora")
    with refused(model, "must be a Keras model", error=TypeError):
        keras_peft.adapt("model", LoRA(2))


def test_adapt_under_a_name_that_is_taken():
    model = adapted()
    with refused(model, "already", "another `name`"):
        keras_peft.adapt(model, LoRA(2))


def test_adapt_a_model_around_an_adapted_one():
    model = build(NAME)
    keras_peft.adapt(model.backbone, LoRA(2))
    with refused(model, "adapted already"):
        keras_peft.adapt(model, LoRA(2))


def test_adapt_a_second_time_with_another_head():
    model = adapted()
    with refused(model, "chosen with its first adapter"):
        keras_peft.adapt(model, LoRA(2), name="b", head=["output_dense"])


# Keras says that embeddings and inputs have no int8 form in some models.
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize`")
def test_adapt_a_quantized_kernel():
    model = build("functional")
    model.quantize("int8")
    with refused(model, "adapt the float model with `base='int8'`"):
        keras_peft.adapt(model, LoRA(2))


def test_adapt_where_keras_own_lora_is_enabled():
    model = build(NAME)
    model.backbone.enable_lora(2)
    with refused(model, "Keras' own LoRA"):
        keras_peft.adapt(model, LoRA(2))


def test_what_would_lose_the_adapters_is_refused(tmp_path):
    model = adapted()
    with refused(model, "cannot be quantized", "keras_peft.merge(model)"):
        model.quantize("int8")
    with refused(model, "saved as a preset", "keras_peft.merge(model)"):
        model.save_to_preset(tmp_path / "preset")
    with refused(model, "Keras' own LoRA"):
        model.enable_lora(2)
    layer = model.backbone.transformer_layers[0]._feedforward_output_dense
    with refused(model, "carries adapters"):
        layer.quantize("int8")
    with refused(model, "keep to one of the two"):
        layer.enable_lora(2)
    with refused(model, "`model.save()` on the model"):
        keras.saving.serialize_keras_object(layer)


@pytest.mark.parametrize(
    "call",
    [
        keras_peft.merge,
        keras_peft.remove,
        keras_peft.summary,
        lambda model: keras_peft.set_adapter(model, "default"),
        lambda model: keras_peft.save_adapter(model, "never-written"),
        lambda model: keras_peft.disabled(model).__enter__(),
    ],
    ids=["merge", "remove", "summary", "set", "save", "disabled"],
)
def test_a_model_without_adapters(call):
    model = build(NAME)
    with refused(model, "has no adapters", "keras_peft.adapt("):
        call(model)
    keras_peft.adapt(model.backbone, LoRA(2))
    with refused(model, "its layer `backbone` was"):
        call(model)


def test_unknown_adapter_names(tmp_path):
    model = adapted()
    for call in (
        lambda: keras_peft.set_adapter(model, ["default", "other"]),
        lambda: keras_peft.remove(model, "other"),
        lambda: keras_peft.save_adapter(model, tmp_path / "a", "other"),
    ):
        with refused(model, "Its adapters: 'default'", "'other'"):
            call()
    assert not list(tmp_path.iterdir())


def test_merge_twice_and_unmerge_twice():
    model = adapted()
    keras_peft.merge(model)
    with refused(model, "merged already", "keras_peft.unmerge(model)"):
        keras_peft.merge(model)
    keras_peft.unmerge(model)
    with refused(model, "was not merged"):
        keras_peft.unmerge(model)


def test_merge_with_nothing_active():
    model = adapted()
    keras_peft.set_adapter(model, None)
    with refused(model, "No adapter is active"):
        keras_peft.merge(model)


def test_merge_of_not_a_number_changes_no_layer():
    model = adapted()
    leaves = list(keras_peft.adapter_state.leaves(model, "default").values())
    leaves[-1].lora_kernel_b.assign(leaves[-1].lora_kernel_b * np.nan)
    with refused(model, "would not be finite", "Nothing was merged"):
        keras_peft.merge(model)


def test_unmerge_after_the_merged_kernels_were_trained():
    model = adapted("functional")
    keras_peft.merge(model)
    kernel = model.get_layer("out").kernel
    kernel.assign(kernel + 1.0)
    with refused(model, "were changed after `merge`", "out"):
        keras_peft.unmerge(model)


def test_a_hand_wrapped_layer_is_no_adapted_model():
    inputs = keras.Input((5,))
    wrapped = keras_peft.layers.LoRA(keras.layers.Dense(3), rank=2)
    model = keras.Model(inputs, wrapped(inputs))
    with refused(model, "wrapped by hand"):
        keras_peft.merge(model)
    with pytest.raises(ValueError, match="rank 9 is larger"):
        keras_peft.layers.LoRA(keras.layers.Dense(3), rank=9)(inputs)
    with pytest.raises(TypeError, match="no kernel that can be adapted"):
        keras_peft.layers.LoRA(keras.layers.Dropout(0.1))(inputs)


def test_a_checkpoint_frequency_that_is_none():
    with pytest.raises(ValueError, match="Received: save_freq=0"):
        keras_peft.AdapterCheckpoint("run", save_freq=0)


def test_a_model_with_adapters_is_not_exported(tmp_path):
    model = adapted()
    with refused(model, "keras_peft.merge(model)"):
        keras_peft.export.to_onnx(model, tmp_path / "app")
    assert not list(tmp_path.iterdir())


EXPORTS = {
    "quantize": (dict(quantize="int3"), "'int8'"),
    "labels": (dict(labels=["one"]), "one name per class"),
    "evaluation": (dict(evaluation=(1, 2, 3)), "is a pair"),
}


@pytest.mark.parametrize("arguments, words", EXPORTS.values(), ids=EXPORTS)
def test_export_arguments(arguments, words, tmp_path):
    model = build("functional")
    with refused(model, words):
        keras_peft.export.to_onnx(model, tmp_path / "app", **arguments)
    assert not list(tmp_path.iterdir())


def test_an_export_of_a_model_that_was_never_called(tmp_path):
    model = keras.Sequential([keras.layers.Dense(3)])
    with refused(model, "Call it on a batch"):
        keras_peft.export.to_onnx(model, tmp_path / "app")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_export(tmp_path):
    model = build("functional")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with refused(model, "precious"):
        keras_peft.export.to_onnx(model, tmp_path / "precious")
    with refused(model, "manifest.json"):
        keras_peft.export.verify(tmp_path / "precious", model)
    assert (tmp_path / "precious" / "thesis.txt").exists()


def test_a_missing_extra_is_named():
    # Hidden from the import system before anything of ours is loaded.
    assert importlib.util.find_spec("onnx")
    code = """
import sys
sys.modules["onnx"] = None
import keras, keras_peft
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
try:
    keras_peft.export.to_onnx(model, "never-written")
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
    )
    assert "keras-peft[export]" in done.stdout, done.stderr


def test_refused_calls_leave_the_outputs():
    model = adapted()
    before = outputs(model, NAME)
    with pytest.raises(ValueError):
        keras_peft.adapt(model, LoRA(99), name="b")
    assert np.array_equal(outputs(model, NAME), before)
