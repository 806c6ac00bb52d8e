"""Laws of single methods that change kernels: what they share, prune, see."""

import keras
import numpy as np
import pytest
from models import build
from models import data
from models import fit
from models import outputs
from models import same_bits
from models import values
from table import LAYERS
from table import randomize
from table import rounding

import keras_peft
from keras_peft import adapter_state
from keras_peft.importance import WatchingOptimizer
from keras_peft.kernels import kernel_of

numpy = keras.ops.convert_to_numpy

# -- LoKr --------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, factor, expected",
    [
        (256, -1, (16, 16)),
        (128, -1, (8, 16)),
        (127, -1, (1, 127)),
        (128, 4, (4, 32)),
        (128, 5, (4, 32)),
        (12, 6, (6, 2)),
    ],
)
def test_sizes_are_split_as_in_lycoris(size, factor, expected):
    method = keras_peft.LoKr(decompose_factor=factor)
    layer = keras.layers.Dense(1)
    layer.build((None, size))
    split = method.split(layer)
    assert (split.first[0], split.second[0]) == expected


# -- VeRA --------------------------------------------------------------------


@pytest.mark.slice
def test_projections_are_shared_and_kept_once(tmp_path):
    from safetensors.numpy import load_file

    model = build("bert-classifier")
    keras_peft.adapt(model, keras_peft.VeRA(rank=8, seed=3))
    kernels = [
        kernel_of(leaf.kernel.layer)
        for leaf in adapter_state.leaves(model, "default").values()
    ]
    keras_peft.save_adapter(model, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter.safetensors")
    found = {k: v.shape for k, v in tensors.items() if "projection" in k}
    assert sorted(found.values()) == [
        (8, max(kernel.outputs for kernel in kernels)),
        (max(kernel.inputs for kernel in kernels), 8),
    ]
    other = build("bert-classifier")
    keras_peft.adapt(other, keras_peft.VeRA(rank=8, seed=3))
    own = [leaf.factors()[0] for leaf in _leaves(model).values()]
    drawn = [leaf.factors()[0] for leaf in _leaves(other).values()]
    for ours, theirs in zip(own, drawn, strict=True):
        assert np.array_equal(numpy(ours), numpy(theirs))


def _leaves(model):
    return adapter_state.leaves(model, "default")


# -- SHiRA -------------------------------------------------------------------


@pytest.mark.slice
def test_only_the_chosen_entries_change():
    model = build("functional")
    before = values(model.variables)
    keras_peft.adapt(model, keras_peft.SHiRA(rank=1))
    assert all(
        len({*map(tuple, _indices(leaf))}) == len(_indices(leaf))
        for leaf in _leaves(model).values()
    )
    counts = {
        leaf.kernel.variable.path: len(_indices(leaf))
        for leaf in _leaves(model).values()
    }
    randomize(model)
    fit(model, "functional", epochs=1)
    keras_peft.merge(model)
    for path, value in values(model.variables).items():
        changed = np.count_nonzero(value != before[path])
        assert changed == counts.get(path, 0)


def _indices(leaf):
    return numpy(leaf.shira_indices)


# -- AdaLoRA -----------------------------------------------------------------


STEPS, RATE, ALPHA, PENALTY, BETAS = 9, 0.03, 6.0, 0.1, (0.85, 0.6)


def two_layers():
    """A model whose gradients are a few lines of NumPy, and its data."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5,))
    hidden = keras.layers.Dense(6, name="first")(inputs)
    hidden = keras.layers.Dense(4, name="second")(hidden)
    model = keras.Model(inputs, hidden)
    method = keras_peft.AdaLoRA(3, ALPHA, PENALTY)
    keras_peft.adapt(model, method, "all-linear", head=[])
    randomize(model)
    rng = np.random.default_rng(0)
    for variable in model.layers[1].kernel, model.layers[2].kernel:
        value = rng.normal(scale=0.3, size=variable.shape)
        variable.assign(value.astype("float32"))
    x, y = rng.normal(size=(7, 5)), rng.normal(size=(7, 4))
    model.compile(keras.optimizers.SGD(RATE), "mse")
    return model, x.astype("float32"), y.astype("float32")


def gradients(kernels, biases, factors, x, y):
    """Of the mean squared error and the penalty: `[[P, E, Q], ...]`."""
    scale = ALPHA / 3
    merged = [
        kernel + scale * p * e @ q
        for kernel, (p, e, q) in zip(kernels, factors, strict=True)
    ]
    hidden = x @ merged[0] + biases[0]
    error = 2 * (hidden @ merged[1] + biases[1] - y) / y.size
    full = [x.T @ error @ merged[1].T, hidden.T @ error]
    found = []
    for gradient, (p, e, q) in zip(full, factors, strict=True):
        columns, rows = _direction(p.T @ p), _direction(q @ q.T)
        found.append(
            [
                scale * gradient @ (e[:, None] * q).T + p @ columns,
                scale * np.diag(p.T @ gradient @ q.T),
                scale * (p * e).T @ gradient + rows @ q,
            ]
        )
    return found


def _direction(gram):
    """Half the gradient of a Gram matrix's share in the penalty, of four."""
    excess = gram - np.eye(len(gram))
    return 2 * PENALTY / 4 * excess / np.linalg.norm(excess)


def importance_of(sums):
    """Eq. 8 of the paper, for the singular values of one layer."""
    p, e, q = (smooth * spread for smooth, spread in sums)
    return e + p.mean(axis=0) + q.mean(axis=1)


def prune(factors, sums, budget):
    """Eq. 6: all but the `budget` most important are zero."""
    scores = np.concatenate([importance_of(s) for s in sums])
    least = np.sort(scores)[::-1][budget - 1]
    masks = [(importance_of(s) >= least).astype("float64") for s in sums]
    for factor, mask in zip(factors, masks, strict=True):
        factor[1] *= mask
    return masks


def papers_allocation(kernels, biases, factors, x, y, warmup, final, interval):
    """Algorithm 1 of the paper: `(factors, masks)` after all steps."""
    beta1, beta2 = BETAS
    sums = [[[0.0, 0.0] for _ in factor] for factor in factors]
    masks = [np.ones(3), np.ones(3)]
    last = STEPS - final
    for step in range(1, STEPS + 1):
        live = [
            [p, e * mask, q]
            for (p, e, q), mask in zip(factors, masks, strict=True)
        ]
        found = gradients(kernels, biases, live, x, y)
        for factor, gradient, total, mask in zip(
            factors, found, sums, masks, strict=True
        ):
            gradient[1] = gradient[1] * mask
            for i in range(3):
                sensitivity = np.abs(factor[i] * gradient[i])
                smooth = beta1 * total[i][0] + (1 - beta1) * sensitivity
                spread = np.abs(sensitivity - smooth)
                spread = beta2 * total[i][1] + (1 - beta2) * spread
                total[i] = [smooth, spread]
                factor[i] = factor[i] - RATE * gradient[i]
        if warmup < step < last and step % interval == 0:
            share = (1 - (step - warmup) / (last - warmup)) ** 3
            prune(factors, sums, 2 + int(4 * share))
        if step == last:
            masks = prune(factors, sums, 2)
    return factors, masks


@pytest.mark.slice
@pytest.mark.parametrize("warmup, final, interval", [(1, 2, 2), (0, 0, 3)])
def test_ranks_are_allocated_as_in_the_paper(warmup, final, interval):
    model, x, y = two_layers()
    leaves = list(_leaves(model).values())
    kernels = [leaf.kernel.read().astype("float64") for leaf in leaves]
    biases = [leaf.kernel.read_bias() for leaf in leaves]
    factors = [
        [numpy(v).astype("float64") for v in leaf.learned] for leaf in leaves
    ]
    allocator = keras_peft.RankAllocator(
        1, warmup, final, interval, *BETAS, name="default"
    )
    model.fit(
        x, y, batch_size=7, epochs=STEPS, verbose=0, callbacks=[allocator]
    )
    factors, masks = papers_allocation(
        kernels, biases, factors, x, y, warmup, final, interval
    )
    # float32 against float64: products of at most 7 terms, in each of the
    # steps, of numbers below 4.
    tolerance = STEPS * 7 * 4 * 2.0**-23
    for leaf, expected, mask in zip(leaves, factors, masks, strict=True):
        assert np.array_equal(numpy(leaf.adalora_mask), mask)
        for variable, value in zip(leaf.learned, expected, strict=True):
            assert np.abs(numpy(variable) - value).max() <= tolerance
    assert list(allocator.ranks.values()) == [int(m.sum()) for m in masks]
    assert sum(allocator.ranks.values()) == 2


@pytest.mark.slice
def test_pruned_values_stay_zero_and_the_optimizer_is_its_own_again():
    model, x, y = two_layers()
    model.compile(keras.optimizers.Adam(RATE), "mse")
    model.fit(x, y, verbose=0)
    optimizer, cls = model.optimizer, type(model.optimizer)
    before = [v.path for v in optimizer.variables]
    allocator = keras_peft.RankAllocator(target_rank=1, final_steps=1)
    model.fit(x, y, epochs=4, verbose=0, callbacks=[allocator])
    assert model.optimizer is optimizer and type(optimizer) is cls
    assert [v.path for v in optimizer.variables] == before
    assert not hasattr(optimizer, "importance")
    masks = [numpy(leaf.adalora_mask) for leaf in _leaves(model).values()]
    model.fit(x, y, epochs=3, verbose=0)
    ranks = 0
    for leaf, mask in zip(_leaves(model).values(), masks, strict=True):
        assert np.array_equal(numpy(leaf.adalora_mask), mask)
        delta = leaf.kernel_delta(leaf.kernel.read())
        ranks += np.linalg.matrix_rank(delta, tol=1e-6)
    assert ranks == 2


def test_a_run_that_was_killed_allocates_the_same_ranks(tmp_path):
    def train(folder, epochs=6, kill=None):
        model, x, y = two_layers()
        callbacks = [
            keras_peft.RankAllocator(1, interval=2),
            keras_peft.AdapterCheckpoint(folder),
        ]
        if kill:
            callbacks.append(
                keras.callbacks.LambdaCallback(on_epoch_begin=kill)
            )
        model.fit(
            x, y, batch_size=7, epochs=epochs, verbose=0, callbacks=callbacks
        )
        return values(model.trainable_variables), callbacks[0].ranks

    def kill(epoch, logs):
        if epoch == 4:
            raise KeyboardInterrupt

    expected = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", kill=kill)
    found = train(tmp_path / "killed")
    assert same_bits(expected[0], found[0]) and expected[1] == found[1]


def test_a_model_file_from_within_training_keeps_the_optimizers_slots(
    tmp_path,
):
    model, x, y = two_layers()
    model.compile(keras.optimizers.Adam(RATE), "mse")
    file = tmp_path / "model.keras"
    model.fit(
        x,
        y,
        verbose=0,
        callbacks=[
            keras_peft.RankAllocator(1),
            keras.callbacks.ModelCheckpoint(file),
        ],
    )
    other = keras.models.load_model(file).optimizer
    assert len(other.variables) == len(model.optimizer.variables)
    for ours, theirs in zip(
        model.optimizer.variables, other.variables, strict=True
    ):
        assert np.array_equal(numpy(ours), numpy(theirs))


def test_the_penalty_is_a_mean_of_norms_and_counts_each_layer_once():
    inputs = keras.Input((4,))
    layer = keras.layers.Dense(4)
    outputs = keras.layers.Dense(3)(layer(layer(inputs)))
    model = keras.Model(inputs, outputs)
    method = keras_peft.AdaLoRA(2, orthogonality=0.3)
    keras_peft.adapt(model, method, "all-linear", head=[])
    randomize(model)
    excess = []
    for leaf in _leaves(model).values():
        p, q = numpy(leaf.adalora_p), numpy(leaf.adalora_q)
        excess += [p.T @ p - np.eye(2), q @ q.T - np.eye(2)]
    assert len(excess) == 4
    expected = 0.3 * np.mean([np.linalg.norm(e) for e in excess])
    found = float(numpy(sum(model.losses)))
    # float32, sums of 4 terms.
    assert found == pytest.approx(expected, rel=16 * 2.0**-23)


SETTINGS = {
    "loha rank": (lambda: keras_peft.LoHa(rank=0), "positive integer"),
    "loha alpha": (lambda: keras_peft.LoHa(alpha=-1), "`alpha`"),
    "lokr rank": (lambda: keras_peft.LoKr(rank=1.5), "positive integer"),
    "lokr factor": (
        lambda: keras_peft.LoKr(decompose_factor=0),
        "`decompose_factor`",
    ),
    "vera rank": (lambda: keras_peft.VeRA(rank=-1), "positive integer"),
    "vera start": (lambda: keras_peft.VeRA(d_initial=0), "`d_initial`"),
    "vera seed": (lambda: keras_peft.VeRA(seed=-1), "`seed`"),
    "miss rank": (lambda: keras_peft.MiSS(rank=True), "positive integer"),
    "shira rank": (lambda: keras_peft.SHiRA(rank=0), "positive integer"),
    "adalora rank": (lambda: keras_peft.AdaLoRA(rank=0), "positive integer"),
    "adalora penalty": (
        lambda: keras_peft.AdaLoRA(orthogonality=-0.1),
        "`orthogonality`",
    ),
}


@pytest.mark.parametrize("make, words", SETTINGS.values(), ids=SETTINGS)
def test_settings_out_of_range_are_refused(make, words):
    with pytest.raises(ValueError, match="Received: ") as caught:
        make()
    assert words in str(caught.value)


def test_kernels_that_are_too_small_are_named():
    layer = keras.layers.Dense(6)
    layer.build((None, 5))
    for method, words in (
        (keras_peft.LoHa(6), "rank 6 is larger"),
        (keras_peft.AdaLoRA(6), "rank 6 is larger"),
        (keras_peft.MiSS(6), r"inputs (5)"),
        (keras_peft.SHiRA(3), "33 entries of its kernel, which has 30"),
    ):
        assert words in method.objection("layer", layer)


ALLOCATORS = {
    "target_rank": (dict(target_rank=0), "positive integer"),
    "interval": (dict(interval=0), "positive integer"),
    "beta1": (dict(beta1=1.0), "between 0 and 1"),
    "target above rank": (dict(target_rank=4), "has 6"),
    "no steps left": (dict(final_steps=3, total_steps=3), "of 3"),
    "other name": (dict(name="other"), "no adapter of that name"),
}


@pytest.mark.parametrize("settings, words", ALLOCATORS.values(), ids=ALLOCATORS)
def test_allocators_that_cannot_work_change_nothing(settings, words):
    model, x, y = two_layers()
    before = values(model.variables)
    with pytest.raises(ValueError, match="Received: ") as caught:
        allocator = keras_peft.RankAllocator(**{"target_rank": 1, **settings})
        model.fit(x, y, verbose=0, callbacks=[allocator])
    assert words in str(caught.value)
    assert same_bits(before, values(model.variables))
    assert not isinstance(model.optimizer, WatchingOptimizer)


def test_an_allocator_refuses_adapters_of_fixed_rank():
    model = build("functional")
    keras_peft.adapt(model, keras_peft.LoRA(2))
    with pytest.raises(ValueError, match="AdaLoRA"):
        callbacks = [keras_peft.RankAllocator(1)]
        fit(model, "functional", callbacks=callbacks)


# -- LoRA from data ----------------------------------------------------------


def patches(inputs, row):
    """The inputs of each output of a `conv2d-strided`, by NumPy alone."""
    found = []
    # Stride 2 of "same" padding over 8 pixels: one pixel at the end.
    padded = np.pad(inputs, [(0, 0), (0, 1), (0, 1), (0, 0)])
    for i in range(0, 8, 2):
        for j in range(0, 8, 2):
            taps = padded[:, i : i + 3, j : j + 3]
            found.append(taps.reshape(len(inputs), -1))
    return np.concatenate(found)


INPUT_ROWS = {
    "dense-relu": lambda x, row: x.reshape(-1, 5),
    "einsum-output": lambda x, row: x.reshape(-1, 6),
    "einsum-transposed-output": lambda x, row: x.reshape(-1, 5),
    "conv2d-strided": patches,
}


@pytest.mark.slice
@pytest.mark.parametrize("name", INPUT_ROWS)
def test_eva_starts_from_the_principal_directions_of_the_inputs(name):
    row = LAYERS[name]
    layer, inputs = row.build()
    shape = (None, *inputs.shape[1:])
    placeholder = keras.Input(shape[1:])
    model = keras.Model(placeholder, layer(placeholder))
    before = numpy(model(inputs))
    batches = [inputs, 2 * inputs[::-1]]
    method = keras_peft.LoRA(2, init="eva")
    cls, attributes = type(layer), set(vars(layer))
    keras_peft.adapt(model, method, [layer.name], calibration=batches)
    assert np.array_equal(numpy(model(inputs)), before)
    (leaf,) = _leaves(model).values()
    a = numpy(leaf.lora_kernel_a)
    rows = [INPUT_ROWS[name](batch, row) for batch in batches]
    rows = np.concatenate(rows).astype("float64")
    _, sizes, directions = np.linalg.svd(rows, full_matrices=False)
    expected = directions[:2].T
    # How far rounding turns a subspace: by its size over the gap behind it.
    turn = 8 * rounding("float32") * sizes[0] ** 2
    tolerance = turn / (sizes[1] ** 2 - sizes[2] ** 2) + 2.0**-22
    assert np.abs(a @ a.T - expected @ expected.T).max() <= tolerance
    keras_peft.remove(model)
    assert type(layer) is cls and set(vars(layer)) == attributes


@pytest.mark.slice
def test_eva_in_a_whole_model_trains():
    model = build("bert-classifier")
    inputs, _ = data("bert-classifier")
    before = outputs(model, "bert-classifier")
    keras_peft.adapt(model, keras_peft.LoRA(2, init="eva"), calibration=inputs)
    assert np.array_equal(outputs(model, "bert-classifier"), before)
    losses = fit(model, "bert-classifier", epochs=3)
    assert losses[-1] < losses[0]


def eva(**settings):
    return keras_peft.LoRA(2, init="eva", **settings)


CALIBRATIONS = {
    "missing": (eva, {}, "Pass `calibration`"),
    "useless": (
        lambda: keras_peft.LoRA(2),
        {"calibration": np.ones((8, 5), "float32")},
        "leave it out",
    ),
    "empty": (eva, {"calibration": []}, "at least one batch"),
    "too few": (
        eva,
        {"calibration": np.ones((1, 5), "float32"), "targets": ["out"]},
        "more data",
    ),
}


@pytest.mark.parametrize(
    "method, arguments, words", CALIBRATIONS.values(), ids=CALIBRATIONS
)
def test_calibrations_that_cannot_work_change_nothing(method, arguments, words):
    model = build("functional")
    before, classes = values(model.variables), list(map(type, model.layers))
    with pytest.raises(ValueError, match="Received: ") as caught:
        keras_peft.adapt(model, method(), **arguments)
    assert words in str(caught.value)
    assert same_bits(before, values(model.variables))
    assert list(map(type, model.layers)) == classes


def test_eva_is_refused_where_no_channels_are_mixed():
    for name in ("embedding", "depthwise2d"):
        layer, _ = LAYERS[name].build()
        assert "mix the channels" in eva().objection("layer", layer)
    wrapped = keras_peft.layers.LoRA(keras.layers.Dense(3), 2, init="eva")
    with pytest.raises(ValueError, match="calibration"):
        wrapped(np.ones((1, 4), "float32"))
