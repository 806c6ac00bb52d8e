"""Laws of combining adapters: what is added up are changes of kernels."""

import json

import keras
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import assume
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from models import build
from models import outputs
from models import same_bits
from models import values
from table import randomize

import keras_peft
from keras_peft import adapter_io
from keras_peft import adapter_state

pytestmark = pytest.mark.slice
NAME = "bert-classifier"
# The sum is exact; each of two factors, and their product, is rounded once.
EXACT = 4 * 2.0**-24

# Every scaling, a pattern, another set of layers, and a start that is
# subtracted: what the scale and the ranks of one adapter may look like.
SOURCES = {
    "plain": (keras_peft.LoRA(2), ["query", "value"]),
    "alpha": (keras_peft.LoRA(2, alpha=5), ["query", "key"]),
    "stabilized": (
        keras_peft.LoRA(3, alpha=2, scaling="rank_stabilized"),
        ["query", "value"],
    ),
    "pattern": (
        keras_peft.LoRA(
            1, rank_pattern={"query_dense": 4}, alpha_pattern={"value_dense": 3}
        ),
        ["query", "value"],
    ),
    "pissa": (keras_peft.LoRA(2, alpha=3, init="pissa"), ["query", "value"]),
    "loftq": (keras_peft.LoRA(2, init="loftq"), ["query", "value"]),
    "olora": (keras_peft.LoRA(2, init="olora"), ["query", "key"]),
    "embedding": (keras_peft.LoRA(2), ["embeddings", "value"]),
}


def save(folder, method, targets, scale=0.3, head=None):
    """An adapter folder of a trained-looking adapter."""
    model = build(NAME)
    keras_peft.adapt(model, method, targets, head=head)
    randomize(model, scale=scale)
    keras_peft.save_adapter(model, folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {key: save(root / key, *row) for key, row in SOURCES.items()}


def changes(folder):
    """`{path: change of the kernel}` of a folder, by NumPy alone."""
    settings = json.loads((folder / "adapter.json").read_text())
    method = keras_peft.LoRA(**settings["method"]["settings"])
    tensors = safetensors.numpy.load_file(folder / "adapter.safetensors")
    found = {}
    for path in settings["layers"]:
        get = {
            key: tensors.get(f"{path}.lora_{key}", np.zeros((1, 1)))
            for key in ("kernel_a", "kernel_b", "initial_a", "initial_b")
        }
        get = {key: value.astype("float64") for key, value in get.items()}
        product = get["kernel_a"] @ get["kernel_b"]
        product = product - get["initial_a"] @ get["initial_b"]
        found[path] = method.scale_of(path) * product
    return found


def weighted_sum(found, weights):
    total = {}
    for each, weight in zip(found, weights, strict=True):
        for path, change in each.items():
            if weight:
                total[path] = total.get(path, 0) + weight * change
    return total


def distance(found, expected):
    """The largest distance of a layer's change, over the expected one."""
    assert found.keys() == expected.keys()
    return max(
        np.linalg.norm(found[p] - expected[p]) / np.linalg.norm(expected[p])
        for p in expected
    )


pairs = st.lists(st.sampled_from(sorted(SOURCES)), min_size=1, max_size=3)
weights = st.floats(-2, 2).filter(lambda w: abs(w) > 0.1)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), names=pairs, method=st.sampled_from(["cat", "linear"]))
def test_cat_and_linear_are_the_weighted_sum(
    folders, tmp_path_factory, data, names, method
):
    chosen = [data.draw(weights) for _ in names]
    out = tmp_path_factory.mktemp("out") / "sum"
    adapters = [folders[name] for name in names]
    expected = weighted_sum([changes(a) for a in adapters], chosen)
    sizes = [np.linalg.norm(change) for change in expected.values()]
    # Equal adapters may cancel; what is left of them is rounding.
    assume(min(sizes) > 1e-3)
    try:
        report = keras_peft.combine_adapters(adapters, chosen, out, method)
    except ValueError as error:
        assert method == "cat" and "add up to more than" in str(error)
        return
    # A sum of three may be ten times smaller than its terms.
    assert distance(changes(out), expected) <= 10 * EXACT
    assert report.worst[1] <= 10 * EXACT


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("method", ["cat", "linear", "svd"])
def test_one_adapter_of_weight_one_is_itself(folders, tmp_path, name, method):
    expected = changes(folders[name])
    for others in ([], ["alpha"]):
        adapters = [folders[key] for key in (name, *others)]
        chosen = [1.0, 0.0][: len(adapters)]
        keras_peft.combine_adapters(
            adapters, chosen, tmp_path / "out", method, head=0
        )
        assert distance(changes(tmp_path / "out"), expected) <= EXACT


@pytest.mark.parametrize("method", ["ties", "dare", "magnitude_prune"])
def test_pruning_nothing_of_one_adapter_is_itself(folders, tmp_path, method):
    expected = changes(folders["stabilized"])
    adapters = [folders["stabilized"], folders["plain"]]
    keras_peft.combine_adapters(
        adapters, [1, 0], tmp_path / "out", method, density=1.0, head=0
    )
    assert distance(changes(tmp_path / "out"), expected) <= EXACT


@pytest.mark.parametrize(
    "method, options",
    [
        ("cat", {}),
        ("linear", {}),
        ("svd", {"rank": 2}),
        ("ties", {"density": 0.5}),
        ("magnitude_prune", {"density": 0.5}),
        ("dare", {"density": 0.5, "seed": 3}),
    ],
)
def test_negative_weights_negate(folders, tmp_path, method, options):
    adapters = [folders["plain"], folders["alpha"]]
    found = {}
    for sign in (1, -1):
        out = tmp_path / str(sign)
        chosen = [sign * 0.7, sign * 0.2]
        keras_peft.combine_adapters(adapters, chosen, out, method, **options)
        found[sign] = changes(out)
    negated = {path: -change for path, change in found[1].items()}
    assert distance(found[-1], negated) <= EXACT


def test_a_repeated_adapter_needs_no_more_ranks(folders, tmp_path):
    twice = [folders["plain"]] * 2
    found = {
        method: keras_peft.combine_adapters(
            twice, [0.5, 0.25], tmp_path / method, method
        )
        for method in ("cat", "linear")
    }
    assert set(found["cat"].ranks.values()) == {4}
    assert set(found["linear"].ranks.values()) == {2}


def test_svd_is_the_nearest_of_its_rank_and_says_how_near(folders, tmp_path):
    adapters = [folders["plain"], folders["alpha"]]
    total = weighted_sum([changes(a) for a in adapters], [0.6, -0.3])
    report = keras_peft.combine_adapters(
        adapters, [0.6, -0.3], tmp_path / "out", "svd", rank=1
    )
    for path, change in changes(tmp_path / "out").items():
        values = np.linalg.svd(total[path], compute_uv=False)
        missed = np.linalg.norm(change - total[path])
        # Eckart and Young: nothing of rank 1 misses less.
        assert abs(missed - np.linalg.norm(values[1:])) <= EXACT * values[0]
        share = missed / np.linalg.norm(total[path])
        assert abs(report.residuals[path] - share) <= EXACT
    assert report.worst[1] > 0.1


def keep_largest(change, density):
    order = np.argsort(-np.abs(change), axis=None)
    kept = np.zeros(change.size)
    kept[order[: int(np.ceil(density * change.size))]] = 1
    return change * kept.reshape(change.shape)


def ties(changes, density):
    """Algorithm 1 of the paper, entry by entry."""
    trimmed = [keep_largest(change, density) for change in changes]
    merged = np.zeros_like(trimmed[0])
    for index in np.ndindex(merged.shape):
        entries = [t[index] for t in trimmed]
        sign = np.sign(sum(entries))
        agreeing = [e for e in entries if e * sign > 0]
        merged[index] = np.mean(agreeing) if agreeing else 0.0
    return merged


def pruned_sum(changes, density):
    return sum(keep_largest(change, density) for change in changes)


@pytest.mark.parametrize(
    "method, reference", [("ties", ties), ("magnitude_prune", pruned_sum)]
)
def test_pruning_follows_the_paper(folders, tmp_path, method, reference):
    adapters = [folders["plain"], folders["stabilized"]]
    chosen, density = [0.8, -0.5], 0.3
    parts = [changes(a) for a in adapters]
    out = tmp_path / "out"
    keras_peft.combine_adapters(
        adapters, chosen, out, method, rank=8, density=density
    )
    expected = {
        path: reference(
            [w * p[path] for w, p in zip(chosen, parts, strict=True)], density
        )
        for path in parts[0]
    }
    assert distance(changes(out), expected) <= EXACT
    report = keras_peft.combine_adapters(
        adapters, chosen, out, method, density=density
    )
    # By default of the largest rank; what that misses is said.
    assert max(report.ranks.values()) == 3
    found = changes(out)
    for path, change in expected.items():
        share = np.linalg.norm(found[path] - change) / np.linalg.norm(change)
        assert abs(report.residuals[path] - share) <= EXACT


def test_dare_drops_at_random_and_keeps_the_mean(folders, tmp_path):
    expected = changes(folders["plain"])

    def dare(seed):
        keras_peft.combine_adapters(
            [folders["plain"]],
            [1.0],
            tmp_path / "out",
            "dare",
            rank=8,
            density=0.5,
            seed=seed,
        )
        return changes(tmp_path / "out")

    found = dare(1)
    assert distance(dare(1), found) == 0
    assert distance(dare(2), found) > 0.1
    kept = []
    for path, change in found.items():
        size = np.abs(expected[path]).max()
        dropped = np.abs(change) <= 8 * EXACT * size
        rescaled = np.abs(change - 2 * expected[path]) <= 8 * EXACT * size
        assert (dropped | rescaled).all()
        kept.append(1 - dropped.mean())
    # 256 coins: a mean six deviations from a half would be wrong.
    assert abs(np.mean(kept) - 0.5) <= 6 * 0.5 / np.sqrt(256)


@pytest.mark.parametrize("method", ["cat", "linear"])
def test_the_result_is_what_both_compute_together(folders, tmp_path, method):
    names, chosen = ("pattern", "pissa"), (0.7, -1.3)
    model = build(NAME)
    for name in names:
        keras_peft.load_adapter(model, folders[name], name)
    keras_peft.set_adapter(model, dict(zip(names, chosen, strict=True)))
    expected = outputs(model, NAME)
    adapters = [folders[name] for name in names]
    keras_peft.combine_adapters(adapters, chosen, tmp_path / "out", method)
    other = build(NAME)
    keras_peft.load_adapter(other, tmp_path / "out", trainable=True)
    # Two blocks of ten sums of at most 16 products of numbers of size 1.
    limit = 10 * 16 * 2.0**-24 * np.abs(expected).max()
    assert np.abs(outputs(other, NAME) - expected).max() <= limit
    keras_peft.set_adapter(model, "pissa")
    assert np.abs(outputs(model, NAME) - expected).max() > 100 * limit


def test_what_cancels_can_still_learn(folders, tmp_path):
    adapters = [folders["plain"], folders["plain"]]
    keras_peft.combine_adapters(adapters, [1, -1], tmp_path / "out", "linear")
    for change in changes(tmp_path / "out").values():
        assert not change.any()
    model = build(NAME)
    keras_peft.load_adapter(model, tmp_path / "out")
    for leaf in adapter_state.leaves(model, "default").values():
        assert keras.ops.convert_to_numpy(leaf.lora_kernel_a).any()


def test_ranks_reach_the_layers_they_belong_to(tmp_path):
    inputs = keras.Input((6,))
    inner = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(6, name="out")], name="inner"
    )
    outer = keras.layers.Dense(6, name="out")
    model = keras.Model(inputs, outer(inner(inputs)))
    ranks = {r"^out": 1, r"inner\.out": 3}
    keras_peft.adapt(model, keras_peft.LoRA(2, rank_pattern=ranks), "out", "a")
    randomize(model, "a")
    keras_peft.save_adapter(model, tmp_path / "a", "a")
    keras_peft.remove(model)
    adapters = [tmp_path / "a", tmp_path / "a"]
    keras_peft.combine_adapters(adapters, [1, 1], tmp_path / "out")
    keras_peft.load_adapter(model, tmp_path / "out")
    leaves = adapter_state.leaves(model, "default")
    assert {path: leaf.rank for path, leaf in leaves.items()} == {
        "out": 2,
        "inner.out": 6,
    }


# -- Heads -------------------------------------------------------------------


def test_different_heads_need_a_choice(tmp_path):
    heads = {}
    for name, shift in (("a", 0.0), ("b", 1.0)):
        model = build(NAME)
        keras_peft.adapt(model, keras_peft.LoRA(2), "query")
        randomize(model)
        for variable in adapter_state.head_variables(model).values():
            variable.assign(variable + shift)
        keras_peft.save_adapter(model, tmp_path / name)
        variables = adapter_state.head_variables(model).values()
        heads[name] = [keras.ops.convert_to_numpy(v) for v in variables]
    adapters = [tmp_path / "a", tmp_path / "b"]
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="Say whose is kept"):
        keras_peft.combine_adapters(adapters, [0.5, 0.5], out)
    assert not out.exists()
    for index, name in enumerate(heads):
        keras_peft.combine_adapters(adapters, [0.5, 0.5], out, head=index)
        keras_peft.load_adapter(model, out, name)
        variables = adapter_state.head_variables(model).values()
        for variable, value in zip(variables, heads[name], strict=True):
            assert np.array_equal(keras.ops.convert_to_numpy(variable), value)


# -- Refusals ----------------------------------------------------------------

REFUSED = {
    "method": (dict(method="mean"), "`method` must be one of 'cat'"),
    "lengths": (dict(weights=[1.0]), "one weight for each"),
    "one folder": (dict(adapters="a/"), "list of adapter folders"),
    "nan": (dict(weights=[1.0, float("nan")]), "finite"),
    "zeros": (dict(weights=[0.0, 0.0]), "not all of them zero"),
    "unused rank": (dict(rank=4), "no use for `rank`"),
    "unused density": (dict(method="svd", density=0.5), "no use for `density`"),
    "unused seed": (dict(method="ties", density=0.5, seed=1), "for `seed`"),
    "rank 0": (dict(method="svd", rank=0), "positive integer"),
    "no density": (dict(method="ties"), "needs `density`"),
    "density 2": (dict(method="dare", density=2.0), "in (0, 1]"),
    "head": (dict(head=2), "index into the 2 adapters"),
    "too large": (dict(weights=[1] * 5, adapters=5), "`method='linear'`"),
    "no folder": (dict(adapters=["nowhere/"] * 2), "No adapter folder"),
}


@pytest.mark.parametrize("arguments, words", REFUSED.values(), ids=REFUSED)
def test_a_wrong_call_is_refused(folders, tmp_path, arguments, words):
    arguments = {
        "adapters": 2,
        "weights": [1.0, 0.5],
        "folder": tmp_path / "out",
        **arguments,
    }
    if isinstance(arguments["adapters"], int):
        arguments["adapters"] = [folders["plain"]] * arguments["adapters"]
    with pytest.raises(ValueError) as caught:
        keras_peft.combine_adapters(**arguments)
    assert words in str(caught.value) and "Received: " in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, method",
    [
        ("DoRA", keras_peft.LoRA(2, decompose=True)),
        ("LoHa", keras_peft.LoHa(2)),
    ],
)
def test_another_method_is_refused_with_what_to_do(
    folders, tmp_path, name, method
):
    adapters = [folders["plain"], save(tmp_path / "other", method, "query")]
    with pytest.raises(ValueError, match=f"{name} is none.*to_lora"):
        keras_peft.combine_adapters(adapters, [1, 1], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model = build(NAME)
    keras_peft.load_adapter(model, adapters[1])
    keras_peft.to_lora(model)
    keras_peft.save_adapter(model, adapters[1])
    keras_peft.combine_adapters(adapters, [1, 1], tmp_path / "out", "linear")


def test_biases_are_refused(folders, tmp_path):
    method = keras_peft.LoRA(2, use_bias=True)
    adapters = [folders["plain"], save(tmp_path / "other", method, "query")]
    with pytest.raises(ValueError, match="changes biases too.*Received: "):
        keras_peft.combine_adapters(adapters, [1, 1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_of_two_bases_are_refused(folders, tmp_path):
    model = build(NAME)
    kernel = model.backbone.transformer_layers[1]._feedforward_output_dense
    kernel.kernel.assign(kernel.kernel + 1e-3)
    keras_peft.adapt(model, keras_peft.LoRA(2), "query")
    keras_peft.save_adapter(model, tmp_path / "other")
    save(tmp_path / "headless", keras_peft.LoRA(2), "query", head=[])
    for name, words in (
        ("other", "base weights have other values"),
        ("headless", r"its head is \[\], not \['output_dense'\]"),
    ):
        with pytest.raises(ValueError, match=words):
            keras_peft.combine_adapters(
                [folders["plain"], tmp_path / name], [1, 1], tmp_path / "out"
            )
    assert not (tmp_path / "out").exists()


def poisoned(tensors, key):
    tensors[key][0, 0] = np.inf


def misshaped(tensors, key):
    tensors[key] = tensors[key].T.copy()


def missing(tensors, key):
    del tensors[key]


@pytest.mark.parametrize("damage", [poisoned, misshaped, missing])
def test_tensors_that_do_not_fit_are_refused(folders, tmp_path, damage):
    settings, method, tensors = adapter_io.read_files(folders["plain"])
    damage(tensors, next(key for key in tensors if key.endswith("kernel_a")))
    bad = tmp_path / "bad"
    bad.mkdir()
    parts = (settings[key] for key in ("layers", "head"))
    adapter_io.write_files(bad, method, *parts, tensors, settings["base"])
    with pytest.raises(ValueError, match="do not fit its settings"):
        keras_peft.combine_adapters([bad], [1], tmp_path / "out")


# -- The peer ----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # The peer's own.
def test_the_sum_is_the_true_one_where_hugging_face_peft_differs(tmp_path):
    import peft
    import torch

    chosen, shape = [0.7, 0.4], (6, 5)
    model = keras.Sequential(
        [keras.Input(shape[:1]), keras.layers.Dense(shape[1], name="linear")]
    )
    module = torch.nn.Sequential()
    module.add_module("linear", torch.nn.Linear(*shape))
    theirs, truth = None, 0.0
    for name, weight in zip("ab", chosen, strict=True):
        keras_peft.adapt(model, keras_peft.LoRA(2, alpha=8), name=name)
        randomize(model, name)
        keras_peft.save_adapter(model, tmp_path / name, name)
        (path,) = changes(tmp_path / name)
        truth = truth + weight * changes(tmp_path / name)[path]
        config = peft.LoraConfig(
            r=2, lora_alpha=8, target_modules=["linear"], init_lora_weights=True
        )
        if theirs is None:
            theirs = peft.get_peft_model(module, config, name)
        else:
            theirs.add_adapter(name, config)
        leaf = adapter_state.leaves(model, name)[path]
        layer = theirs.base_model.model.linear
        for factors, ours in (
            (layer.lora_A, leaf.lora_kernel_a),
            (layer.lora_B, leaf.lora_kernel_b),
        ):
            value = keras.ops.convert_to_numpy(ours).T
            factors[name].weight.data = torch.tensor(value)
    # Of rank 4, so that a truncation is no excuse.
    options: dict = {"svd": {"rank": 4}, "cat": {}, "linear": {}}
    for method, option in options.items():
        keras_peft.combine_adapters(
            [tmp_path / "a", tmp_path / "b"],
            chosen,
            tmp_path / method,
            method,
            **option,
        )
        found = changes(tmp_path / method)[path]
        assert np.linalg.norm(found - truth) <= EXACT * np.linalg.norm(truth)
    wrong = {}
    for method in options:
        ranks = {"svd_rank": 4} if method == "svd" else {}
        theirs.add_weighted_adapter(
            ["a", "b"], chosen, method, combination_type=method, **ranks
        )
        found = layer.get_delta_weight(method).detach().numpy().T
        wrong[method] = np.linalg.norm(found - truth) / np.linalg.norm(truth)
    # Its SVD is one in float32, of a matrix with 5 columns.
    assert wrong["cat"] <= EXACT and wrong["svd"] <= 5 * EXACT
    # Its "linear" adds products of one adapter's A with the other's B.
    message = "PEFT's `linear` is exact now: docs/combining.md says otherwise."
    assert wrong["linear"] > 0.1, message


def test_inputs_are_left_as_they_were(folders, tmp_path):
    before = {p: p.read_bytes() for p in folders["plain"].iterdir()}
    keras_peft.combine_adapters([folders["plain"]], [2.0], tmp_path / "out")
    assert before == {p: p.read_bytes() for p in folders["plain"].iterdir()}
    model = build(NAME)
    bits = values(model.variables)
    keras_peft.load_adapter(model, tmp_path / "out")
    keras_peft.remove(model)
    assert same_bits(bits, values(model.variables))
