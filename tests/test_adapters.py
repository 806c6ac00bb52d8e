"""Laws of several adapters on one base, and of choosing layers."""

import keras
import numpy as np
import pytest
from models import build
from models import data
from models import fit
from models import outputs
from models import same_bits
from models import summary_of
from models import values
from table import randomize

import keras_peft
from keras_peft import adapter_state
from keras_peft import layer_tree
from keras_peft.methods.lora import LoRAAdapter
from keras_peft.targets import Candidates
from keras_peft.targets import find_head

NAME = "bert-classifier"
pytestmark = pytest.mark.slice


def two_adapters():
    """A model with trained-looking adapters "a" (rank 2) and "b" (rank 4)."""
    model = build(NAME)
    for name, rank, scale in (("a", 2, 0.3), ("b", 4, 0.6)):
        keras_peft.adapt(model, keras_peft.LoRA(rank), name=name)
        randomize(model, name, scale)
        for variable in adapter_state.head_variables(model).values():
            variable.assign(variable + rank)
    return model


def test_each_adapter_has_its_own_outputs_and_head():
    model = two_adapters()
    found = {}
    for names in ("a", "b", None, ["a", "b"], {"b": 0.5}):
        keras_peft.set_adapter(model, names)
        found[str(names)] = outputs(model, NAME)
    assert len({value.tobytes() for value in found.values()}) == 5
    assert np.array_equal(found["None"], outputs(build(NAME), NAME))
    for names in ("a", "b", None):
        keras_peft.set_adapter(model, names)
        assert np.array_equal(outputs(model, NAME), found[str(names)])


def test_the_newest_adapter_is_active_and_trains_alone():
    model = two_adapters()
    assert list(model.peft.active) == ["b"]
    learned = [
        variable
        for leaf in adapter_state.leaves(model, "a").values()
        for variable in leaf.variables
    ]
    before = values(learned)
    fit(model, NAME, epochs=1)
    assert same_bits(before, values(learned))


def test_several_adapters_add_up_their_changes_of_the_kernel():
    model = build("functional")
    for name in ("a", "b"):
        keras_peft.adapt(model, keras_peft.LoRA(2), ["out"], name)
        randomize(model, name)
    leaves = [adapter_state.leaves(model, name)["out"] for name in ("a", "b")]
    keras_peft.set_adapter(model, {"a": 2.0, "b": -1.0})
    base = leaves[0].kernel.read()
    a, b = (
        keras.ops.convert_to_numpy(leaf.lora_kernel_a)
        @ keras.ops.convert_to_numpy(leaf.lora_kernel_b)
        for leaf in leaves
    )
    keras_peft.merge(model)
    merged = keras.ops.convert_to_numpy(model.get_layer("out").kernel)
    # Three float32 terms per entry, products of rank 2.
    assert np.abs(merged - (base + 2 * a - b)).max() <= 2.0**-20


def test_merging_one_of_two_and_unmerging_brings_both_back():
    model = two_adapters()
    keras_peft.set_adapter(model, "a")
    adapted = outputs(model, NAME)
    keras_peft.merge(model)
    keras_peft.unmerge(model)
    assert np.array_equal(outputs(model, NAME), adapted)
    keras_peft.set_adapter(model, "b")
    assert not np.array_equal(outputs(model, NAME), adapted)


def test_removing_one_adapter_leaves_the_other():
    model = two_adapters()
    expected = outputs(model, NAME)
    keras_peft.remove(model, "a")
    assert np.array_equal(outputs(model, NAME), expected)
    keras_peft.remove(model, "b")
    assert np.array_equal(outputs(model, NAME), outputs(build(NAME), NAME))
    assert not adapter_state.is_adapted(model)


def test_disabled_is_the_base_and_ends_even_after_an_error():
    model = two_adapters()
    adapted, trained = outputs(model, NAME), len(model.trainable_variables)
    with pytest.raises(KeyError), keras_peft.disabled(model):
        assert np.array_equal(outputs(model, NAME), outputs(build(NAME), NAME))
        raise KeyError
    assert np.array_equal(outputs(model, NAME), adapted)
    assert len(model.trainable_variables) == trained


@pytest.mark.parametrize("kind", ["adapt", "load"])
def test_a_new_adapter_is_in_what_was_compiled_before(kind, tmp_path):
    model = build("functional")
    inputs = data("functional")[0]
    before = model.predict(inputs, verbose=0)
    if kind == "adapt":
        keras_peft.adapt(model, keras_peft.LoRA(2))
        randomize(model)
    else:
        other = keras_peft.adapt(build("functional"), keras_peft.LoRA(2))
        randomize(other)
        keras_peft.save_adapter(other, tmp_path / "adapter")
        keras_peft.load_adapter(model, tmp_path / "adapter")
    after = model.predict(inputs, verbose=0)
    assert not np.allclose(after, before)
    with keras_peft.disabled(model):
        off = model.predict(inputs, verbose=0)
    # Two programs, of which compilers join operations in two ways: each of
    # these numbers, below 1, may round a few times more.
    assert np.allclose(off, before, rtol=0, atol=1e-6)
    assert np.array_equal(model.predict(inputs, verbose=0), after)


@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="torch compiles nothing here"
)
def test_switching_compiles_nothing_anew(monkeypatch):
    calls = []
    call = LoRAAdapter.call
    monkeypatch.setattr(
        LoRAAdapter, "call", lambda *a, **k: calls.append(1) or call(*a, **k)
    )
    model = build("functional")
    for name in ("a", "b"):
        keras_peft.adapt(model, keras_peft.LoRA(2), name=name)
        model.peft.adapters[name].trainable = False
    keras_peft.set_adapter(model, "a")
    inputs = data("functional")[0]
    model.predict(inputs, verbose=0)
    traced = len(calls)
    for names in ("b", ["a", "b"], None, {"a": 0.3}):
        keras_peft.set_adapter(model, names)
        model.predict(inputs, verbose=0)
    with keras_peft.disabled(model):
        model.predict(inputs, verbose=0)
    assert traced and len(calls) == traced


def test_a_model_file_keeps_the_head_of_every_adapter(tmp_path):
    model = two_adapters()
    model.save(tmp_path / "model.keras")
    other = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    for name in ("a", "b", None):
        keras_peft.set_adapter(model, name)
        keras_peft.set_adapter(other, name)
        assert np.array_equal(outputs(other, NAME), outputs(model, NAME))


def test_adapter_folders_keep_the_head_of_an_inactive_adapter(tmp_path):
    model = two_adapters()
    keras_peft.set_adapter(model, "a")
    expected = outputs(model, NAME)
    keras_peft.set_adapter(model, "b")
    keras_peft.save_adapter(model, tmp_path / "a", name="a")
    other = build(NAME)
    keras_peft.load_adapter(other, tmp_path / "a", name="renamed")
    assert np.array_equal(outputs(other, NAME), expected)
    assert not other.trainable_variables


def test_adapting_after_training_keeps_compile_usable():
    model = build("functional")
    keras_peft.adapt(model, keras_peft.LoRA(2), name="a")
    fit(model, "functional", epochs=1)
    keras_peft.adapt(model, keras_peft.LoRA(2), name="b")
    inputs, targets = data("functional")
    before = values(model.trainable_variables)
    keras.Model.fit(model, inputs, targets, verbose=0)
    after = values(model.trainable_variables)
    assert any(not np.array_equal(before[p], after[p]) for p in before)


# -- Targets -----------------------------------------------------------------

BLOCK = r"transformer_layers.\d"
MHA = ("query_dense", "key_dense", "value_dense", "output_dense")
FFN = ("_feedforward_intermediate_dense", "_feedforward_output_dense")
COUNTS = {
    # Two blocks each: four projections and two feed-forward kernels.
    ("bert-classifier", "attention"): 8,
    ("bert-classifier", "mlp"): 4,
    ("bert-classifier", "all-linear"): 13,  # And the pooler, not the head.
    ("bert-classifier", "embeddings"): 2,
    ("bert-classifier", "query"): 2,
    ("bert-classifier", "logits"): 1,
    ("bert-classifier", r"transformer_layers\.1\..*_dense"): 6,
    ("bert-classifier", None): 12,
    # Three feed-forward kernels: gate, up, down.
    ("llama", "attention"): 8,
    ("llama", "mlp"): 6,
    ("llama", None): 14,
    ("gpt2", None): 12,
    ("vit", None): 12,
    ("vit", "convolutions"): 1,
    ("convolutional", "convolutions"): 2,
    ("convolutional", None): 3,
    ("functional", None): 2,
    ("subclassed", "embeddings"): 1,
    ("subclassed", r"blocks\.\d"): 2,
}


@pytest.mark.parametrize(
    "name, target, count", [(*key, count) for key, count in COUNTS.items()]
)
def test_a_target_finds_the_layers_of_the_architecture(name, target, count):
    model = build(name)
    candidates = Candidates(model, find_head(model))
    if target is None:
        found = candidates.default()
    else:
        found = candidates.matching(target)
    assert len(found) == len(set(found)) == count


def test_paths_do_not_depend_on_how_many_models_were_built():
    from keras_peft import layer_tree

    for name in ("sequential", "convolutional", "bert-classifier"):
        first, second = build(name), build(name)
        paths = [path for path, _ in layer_tree.walk(first)]
        assert paths == [path for path, _ in layer_tree.walk(second)]
        assert len(paths) == len(set(paths))


def test_patterns_set_ranks_and_alphas_by_layer():
    model = build("bert-classifier")
    method = keras_peft.LoRA(
        rank=2,
        rank_pattern={"query_dense": 4, r"transformer_layers\.1\..*": 3},
        alpha_pattern={"_feedforward_output_dense": 6},
    )
    keras_peft.adapt(model, method, ["attention", "mlp"])
    for path, leaf in adapter_state.leaves(model, "default").items():
        rank = 4 if "query" in path else 3 if "layers.1" in path else 2
        alpha = 6 if path.endswith("_feedforward_output_dense") else rank
        assert (leaf.rank, leaf.scale) == (rank, alpha / rank)


def test_summary_shows_every_layer_and_the_totals():
    model = two_adapters()
    text = summary_of(model)
    for name in ("a", "b"):
        for path in model.peft.adapters[name].paths:
            assert path in text
    assert "b* LoRA" in text and "a LoRA" in text and "head" in text
    count = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    assert f"{count:,}" in text


def test_a_table_that_the_head_shares_with_the_base_is_the_bases():
    import keras_hub
    from models import bert_backbone

    def masked_lm():
        keras.utils.set_random_seed(0)
        return keras_hub.models.BertMaskedLM(bert_backbone(), preprocessor=None)

    model = masked_lm()
    table = model.backbone.token_embedding.embeddings
    targets = ["attention", "embeddings"]
    keras_peft.adapt(model, keras_peft.LoRA(2), targets)
    head = adapter_state.head_variables(model)
    # Two of a dense layer, two of a normalization, and the bias of tokens.
    assert len(head) == 5
    assert not table.trainable
    keras_peft.remove(model)
    assert table.trainable
    found = adapter_state.variables_below(
        dict(layer_tree.walk(model)), find_head(model)
    )
    # Keys, by which a file knows the head, do not move with an adapter.
    assert list(found) == list(head)
