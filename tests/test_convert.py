"""Laws of turning other things into plain LoRA."""

import keras
import numpy as np
import pytest
from models import build
from models import fit
from models import outputs
from models import same_bits
from models import values
from table import METHODS
from table import randomize

import keras_peft
from keras_peft import adapter_state
from keras_peft import layer_tree
from keras_peft.kernels import has_kernel
from keras_peft.kernels import kernel_of

NAME = "bert-classifier"
# Twelve layers one after another, sums of at most 16 products in each, the
# kernel rounded once more than before.
ROUNDING = 12 * 2 * 16 * 2.0**-24
METHOD_ROWS = [
    pytest.param(row, id=name, marks=[pytest.mark.slice] * row.slice)
    for name, row in METHODS.items()
    if row.models
]


def adapted(row, scale=0.1):
    name = row.models[0]
    model = build(name)
    keras_peft.adapt(model, row.make())
    randomize(model, scale=scale)
    return model, name


def kernels(model):
    """`{path: kernel as a matrix}` of all layers that have one."""
    return {
        path: kernel_of(layer).read().astype("float64")
        for path, layer in layer_tree.walk(model)
        if has_kernel(layer) and layer.built
    }


def others(model):
    """The values of all variables that are no kernel."""
    known = {
        id(kernel_of(layer).variable)
        for _, layer in layer_tree.walk(model)
        if has_kernel(layer) and layer.built
    }
    return values([v for v in model.variables if id(v) not in known])


def changes_kernels_alone(row):
    """Whether LoRA can stand for a method, by merging it."""
    if not row.mergeable:
        return False
    model, name = adapted(row)
    keras_peft.merge(model)
    merged = others(model)
    keras_peft.unmerge(model)
    keras_peft.remove(model)
    before = others(model)
    heads = {p for p in merged if not np.array_equal(merged[p], before[p])}
    return not heads


@pytest.mark.parametrize("row", METHOD_ROWS)
def test_every_change_of_kernels_becomes_a_lora(row):
    model, name = adapted(row)
    expected = outputs(model, name)
    if not changes_kernels_alone(row):
        before = values(model.variables)
        with pytest.raises(ValueError, match="changes more than kernels"):
            keras_peft.to_lora(model)
        assert same_bits(before, values(model.variables))
        return
    report = keras_peft.to_lora(model)
    assert report.worst[1] <= 2.0**-19  # What counts as rounding, twice.
    limit = ROUNDING * np.abs(expected).max()
    assert np.abs(outputs(model, name) - expected).max() <= limit
    for leaf in adapter_state.leaves(model, "default").values():
        assert type(leaf).__name__ == "LoRAAdapter" and leaf.scale == 1.0
    with keras_peft.disabled(model):
        assert np.abs(outputs(model, name) - expected).max() > limit


@pytest.mark.slice
@pytest.mark.parametrize("init, rank", [("default", 2), ("pissa", 4)])
def test_no_more_ranks_are_taken_than_the_change_has(init, rank):
    model = build(NAME)
    keras_peft.adapt(model, keras_peft.LoRA(2, alpha=3, init=init))
    randomize(model)
    report = keras_peft.to_lora(model)
    assert set(report.ranks.values()) == {rank}


@pytest.mark.slice
@pytest.mark.parametrize("rank", [1, 0.9])
def test_ranks_and_energies_are_kept_as_asked(rank):
    model = build(NAME)
    keras_peft.adapt(model, keras_peft.LoRA(4), "attention")
    randomize(model)
    leaves = adapter_state.leaves(model, "default")
    before = {
        p: leaf.kernel_delta(leaf.kernel.read()) for p, leaf in leaves.items()
    }
    report = keras_peft.to_lora(model, rank=rank)
    for path, leaf in adapter_state.leaves(model, "default").items():
        squares = np.linalg.svd(before[path], compute_uv=False) ** 2
        shares = np.cumsum(squares) / squares.sum()
        kept = report.ranks[path]
        assert leaf.rank == kept
        if rank == 1:
            assert kept == 1
        else:
            assert shares[kept - 1] >= 0.9
            assert kept == 1 or shares[kept - 2] < 0.9
        after = leaf.kernel_delta(leaf.kernel.read())
        missed = np.linalg.norm(after - before[path])
        share = missed / np.linalg.norm(before[path])
        # Eckart and Young, and the report of it; a square of rounding.
        assert share**2 == pytest.approx(1 - shares[kept - 1], abs=1e-6)
        assert report.residuals[path] == pytest.approx(share, abs=1e-6)


@pytest.mark.slice
def test_head_strength_and_the_other_adapter_stay():
    model = build(NAME)
    for name in ("a", "b"):
        method = keras_peft.LoRA(2, alpha=3)
        keras_peft.adapt(model, method, "attention", name)
        randomize(model, name, scale=0.1)
        for variable in adapter_state.head_variables(model).values():
            variable.assign(variable + 1.0)
    strengths = {"b": 0.5, "a": -1.0}
    keras_peft.set_adapter(model, strengths)
    expected = outputs(model, NAME)
    trained = len(model.trainable_variables)
    keras_peft.to_lora(model, "a")
    limit = ROUNDING * np.abs(expected).max()
    assert np.abs(outputs(model, NAME) - expected).max() <= limit
    assert model.peft.active == strengths
    assert len(model.trainable_variables) == trained
    assert model.peft.adapters["b"].method == method
    # The inactive one is converted at full strength too.
    keras_peft.set_adapter(model, "b")
    expected = outputs(model, NAME)
    keras_peft.set_adapter(model, "a")
    keras_peft.to_lora(model, "b")
    keras_peft.set_adapter(model, "b")
    assert np.abs(outputs(model, NAME) - expected).max() <= limit


@pytest.mark.slice
def test_a_converted_adapter_saves_loads_merges_and_trains(tmp_path):
    model = build(NAME)
    keras_peft.adapt(model, keras_peft.LoRA(2, decompose=True))
    fit(model, NAME, epochs=1)
    keras_peft.to_lora(model, rank=0.999)
    expected = outputs(model, NAME)
    losses = fit(model, NAME, epochs=2)
    assert losses[-1] < losses[0]
    assert not np.array_equal(outputs(model, NAME), expected)
    expected = outputs(model, NAME)
    keras_peft.save_adapter(model, tmp_path / "a")
    other = build(NAME)
    keras_peft.load_adapter(other, tmp_path / "a")
    assert np.array_equal(outputs(other, NAME), expected)
    keras_peft.combine_adapters([tmp_path / "a"], [1.0], tmp_path / "b")
    keras_peft.merge(model)
    limit = ROUNDING * np.abs(expected).max()
    assert np.abs(outputs(model, NAME) - expected).max() <= limit


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.0, 1.5, "8"])
def test_a_rank_out_of_range_is_refused(rank):
    model = build("functional")
    keras_peft.adapt(model, keras_peft.LoRA(2))
    with pytest.raises(ValueError, match="share of the energy.*Received: rank"):
        keras_peft.to_lora(model, rank=rank)
    with pytest.raises(ValueError, match="share of the energy.*Received: rank"):
        keras_peft.extract_lora(build("functional"), model, rank)


# -- Full fine-tunes ---------------------------------------------------------


def tuned_by(rank, targets=("query", "output"), biases=0.0, head=1.0):
    """A model whose kernels changed by matrices of that rank."""
    model, rng = build(NAME), np.random.default_rng(5)
    for path, layer in layer_tree.walk(model):
        if has_kernel(layer) and any(t in path for t in targets):
            view = kernel_of(layer)
            a = rng.normal(size=(view.inputs, rank), scale=0.2)
            b = rng.normal(size=(rank, view.outputs), scale=0.2)
            kernel = view.read() + (a @ b).astype("float32")
            view.variable.assign(view.from_matrix(kernel))
            if view.bias is not None:
                view.bias.assign(view.bias + biases)
    for variable in model.get_layer("logits").variables:
        variable.assign(variable + head)
    return model


@pytest.mark.slice
def test_a_fine_tune_of_low_rank_is_extracted_whole():
    base, tuned = build(NAME), tuned_by(2)
    expected = outputs(tuned, NAME)
    before = values(base.variables)
    report = keras_peft.extract_lora(base, tuned, rank=2)
    limit = ROUNDING * np.abs(expected).max()
    assert np.abs(outputs(base, NAME) - expected).max() <= limit
    assert set(report.ranks.values()) == {2} and not report.left_out
    assert all("query" in p or "output" in p for p in report.ranks)
    # The change itself was rounded when it was added to the kernel.
    assert report.worst[1] <= 2.0**-18
    keras_peft.remove(base)
    assert same_bits(before, values(base.variables))


@pytest.mark.slice
def test_what_low_rank_cannot_hold_is_measured():
    base, tuned = build(NAME), tuned_by(3, biases=0.5)
    kernel = {p: kernels(tuned)[p] - k for p, k in kernels(base).items()}
    report = keras_peft.extract_lora(base, tuned, rank=2)
    for path, residual in report.residuals.items():
        values = np.linalg.svd(kernel[path], compute_uv=False)
        missed = np.linalg.norm(values[2:]) / np.linalg.norm(values)
        assert residual == pytest.approx(missed, abs=1e-6)
    changed = {f"{path}.bias" for path in report.ranks}
    assert set(report.left_out) == changed
    layers = layer_tree.layers_by_path(base)
    for key, size in report.left_out.items():
        bias = layers[key.removesuffix(".bias")].bias
        bias = keras.ops.convert_to_numpy(bias)
        share = 0.5 * np.sqrt(bias.size) / np.linalg.norm(bias)
        assert size == pytest.approx(share, rel=1e-5)


def test_energy_sets_each_rank():
    base = build(NAME)
    report = keras_peft.extract_lora(base, tuned_by(4), rank=0.8)
    assert all(residual**2 <= 0.2 for residual in report.residuals.values())
    assert len(set(report.ranks.values())) > 1
    for path, leaf in adapter_state.leaves(base, "default").items():
        assert leaf.rank == report.ranks[path]


def test_a_real_fine_tune_is_followed(tmp_path):
    base, tuned = build(NAME), build(NAME)
    fit(tuned, NAME, epochs=3)
    expected, start = outputs(tuned, NAME), outputs(base, NAME)
    distances = []
    for rank in (1, 4, 8):
        keras_peft.extract_lora(base, tuned, rank)
        distances.append(np.linalg.norm(outputs(base, NAME) - expected))
        if rank == 4:
            keras_peft.save_adapter(base, tmp_path / "a")
        keras_peft.remove(base)
    assert distances[-1] < distances[0] < np.linalg.norm(start - expected)
    keras_peft.load_adapter(base, tmp_path / "a")
    found = np.linalg.norm(outputs(base, NAME) - expected)
    assert found == distances[1]


def test_models_that_do_not_belong_together_are_refused():
    base = build(NAME)
    before = values(base.variables)
    adapted = tuned_by(2)
    keras_peft.adapt(adapted, keras_peft.LoRA(2))
    nan = tuned_by(2)
    kernel_of(nan.backbone.get_layer("pooled_dense")).variable.assign(
        np.full((8, 8), np.nan)
    )
    for tuned, words in (
        (build("functional"), "of one architecture: only one has"),
        (build(NAME), "No kernel of `tuned` differs"),
        (tuned_by(2, targets=()), "No kernel of `tuned` differs"),
        (adapted, "`tuned` carries adapters"),
        (nan, "holds NaN"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            keras_peft.extract_lora(base, tuned, 2)
        assert "Received: " in str(caught.value)
        assert same_bits(before, values(base.variables))
        assert not adapter_state.is_adapted(base)
