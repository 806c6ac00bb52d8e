"""Laws of the loss in chunks: the same numbers, and no logits of a batch."""

import keras
import numpy as np
import pytest
from models import build
from models import data
from models import same_bits
from models import values

import keras_peft
from keras_peft import training

WORDS, LENGTH, ROWS, SIZE = 37, 6, 8, 4


def language_model(head="tied", mask=False, cap=None, dtype=None):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((LENGTH,), dtype="int32")
    embedding = keras.layers.ReversibleEmbedding(
        WORDS,
        SIZE,
        name="words",
        tie_weights=head != "untied",
        mask_zero=mask,
        logit_soft_cap=cap if head == "untied" else None,
        # Logits unlike each other.
        embeddings_initializer="random_normal",
        dtype=dtype,
    )
    hidden = embedding(inputs)
    hidden = keras.layers.Dense(SIZE, name="hidden", dtype=dtype)(hidden)
    if head == "dense":
        logits = keras.layers.Dense(WORDS, name="head", dtype=dtype)(hidden)
    else:
        logits = embedding(hidden, reverse=True)
    if cap is not None and head != "untied":
        logits = keras.ops.tanh(logits / cap) * cap
    model = keras.Model(inputs, logits)
    for variable in model.variables:
        variable.assign(keras.random.normal(variable.shape, stddev=0.7, seed=1))
    return model


def adapted(*args, **kwargs):
    model = language_model(*args, **kwargs)
    keras.utils.set_random_seed(1)
    return keras_peft.adapt(model, keras_peft.LoRA(2), "hidden", head=[])


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, WORDS, (ROWS, LENGTH)).astype("int32")
    tokens[0, 4:] = 0
    targets = rng.integers(0, WORDS, (ROWS, LENGTH)).astype("int32")
    weights = rng.uniform(0, 2, (ROWS, LENGTH)).astype("float32")
    return tokens, targets, weights


def trained(model, loss, weighted=True, metrics=True):
    """`(losses and metrics, variables)` after two epochs."""
    tokens, targets, weights = batch()
    weights = weights if weighted else None
    model.compile(
        keras.optimizers.SGD(0.5),
        loss,
        metrics=[keras.metrics.SparseTopKCategoricalAccuracy(9)] * metrics,
        weighted_metrics=["accuracy"] * metrics,
    )
    logs = model.fit(
        tokens,
        targets,
        sample_weight=weights,
        epochs=2,
        batch_size=4,
        shuffle=False,
        verbose=0,
    ).history
    evaluated = model.evaluate(
        tokens, targets, sample_weight=weights, verbose=0, return_dict=True
    )
    logs |= {f"evaluated {name}": value for name, value in evaluated.items()}
    masked = any(getattr(layer, "mask_zero", False) for layer in model.layers)
    if masked and keras.config.backend() != "tensorflow":
        # Metrics of Keras on torch read weights that the loss has scaled in
        # place by the mask, and on JAX no mask at all.
        logs = {name: v for name, v in logs.items() if "loss" in name}
    return logs, values(model.trainable_variables)


def sparse(**kwargs):
    return keras.losses.SparseCategoricalCrossentropy(True, **kwargs)


def assert_same(found, expected, rtol):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_allclose(
                ours[key], theirs[key], rtol=rtol, atol=rtol, err_msg=key
            )


# An adapter does not hand a mask on; Keras warns of it.
unmasked = pytest.mark.filterwarnings("ignore:.*does not support masking")


MODELS = {
    "tied": {},
    "untied-capped": {"head": "untied", "cap": 2.0},
    "capped-after": {"cap": 2.0},
    "masked": {"head": "dense", "mask": True},
}


# On every backend: a head that is read twice, one that trains, one that masks.
SLICE = {("tied", True), ("untied-capped", False), ("masked", True)}


@unmasked
@pytest.mark.parametrize(
    "name, frozen",
    [
        pytest.param(
            name,
            frozen,
            id=f"{name}-{'adapter' if frozen else 'whole'}",
            marks=pytest.mark.slice if (name, frozen) in SLICE else (),
        )
        for name in MODELS
        for frozen in (True, False)
    ],
)
def test_chunks_train_as_the_whole_does(name, frozen):
    make = adapted if frozen else language_model
    models = [make(**MODELS[name]) for _ in range(2)]
    training.chunk_loss(models[0], chunk_size=7)
    found, expected = (trained(m, sparse(ignore_class=3)) for m in models)
    # Float32: sums of a few dozen tokens and words in another order, in four
    # steps.
    assert_same(found, expected, rtol=2**-24 * 48 * 4)


LOSSES = {
    "plain": (sparse, True),
    "unweighted": (lambda: sparse(ignore_class=3), False),
    "sum": (lambda: sparse(reduction="sum"), True),
    "mean": (lambda: sparse(reduction="mean_with_sample_weight"), True),
    "smoothed": (lambda: training.SmoothedCrossentropy(0.2, 3), True),
}


@unmasked
@pytest.mark.parametrize("loss, weighted", LOSSES.values(), ids=LOSSES)
def test_every_loss_of_tokens_is_reduced_as_by_keras(loss, weighted):
    models = [adapted("dense", mask=True) for _ in range(2)]
    training.chunk_loss(models[0], chunk_size=7)
    found, expected = (trained(m, loss(), weighted) for m in models)
    # As above; a sum of losses also takes steps that many times as large.
    assert_same(found, expected, rtol=2**-24 * 48 * 24)


@pytest.mark.slice
def test_bfloat16_is_summed_in_float32():
    models = [adapted(dtype="bfloat16") for _ in range(2)]
    training.chunk_loss(models[0], chunk_size=7)
    # TensorFlow ranks no logits in bfloat16, which these metrics need.
    logs = [trained(m, sparse(), metrics=False)[0] for m in models]
    found, expected = (each["loss"] for each in logs)
    # The gradient is rounded to 8 bits at another place.
    np.testing.assert_allclose(found, expected, rtol=2**-8)


@pytest.mark.slice
def test_a_causal_language_model_trains_in_chunks():
    losses = []
    for chunked in (True, False):
        model = build("llama")
        keras.utils.set_random_seed(1)
        keras_peft.adapt(model, keras_peft.LoRA(2))
        if chunked:
            training.chunk_loss(model, chunk_size=5)
        inputs, targets = data("llama")
        # Compiled as keras-hub does by default, accuracy included.
        model.compile(keras.optimizers.SGD(0.1))
        losses.append(
            keras.Model.fit(
                model, inputs, targets, batch_size=4, shuffle=False, verbose=0
            ).history
        )
    assert losses[0].keys() == losses[1].keys()
    for key in losses[0]:
        np.testing.assert_allclose(losses[0][key], losses[1][key], rtol=1e-5)


# -- What exists -------------------------------------------------------------


def made_on_jax(model, tokens, targets):
    import jax

    state = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = keras.tree.map_structure(lambda v: v.value, state)
    step = jax.make_jaxpr(model.train_step)(state, (tokens, targets))

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            yield from (getattr(v.aval, "size", 0) for v in equation.outvars)
            for value in keras.tree.flatten(list(equation.params.values())):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from walk(inner)

    return list(walk(step.jaxpr))


def made_on_torch(model, tokens, targets):
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in keras.tree.flatten(result):
                if isinstance(tensor, torch.Tensor):
                    sizes.append(tensor.numel())
            return result

    with Watch():
        model.train_step((tokens, targets))
    return sizes


@pytest.mark.slice
@pytest.mark.skipif(
    keras.config.backend() == "tensorflow",
    reason="what a loop of TensorFlow makes is not in its graph",
)
@pytest.mark.parametrize("frozen", [True, False], ids=["adapter", "whole"])
def test_logits_of_the_batch_never_exist(frozen):
    tokens, targets, _ = map(keras.ops.convert_to_tensor, batch())
    made = {"jax": made_on_jax, "torch": made_on_torch}
    made = made[keras.config.backend()]
    sizes = []
    for chunked in (True, False):
        model = adapted() if frozen else language_model()
        model.compile(keras.optimizers.SGD(0.5), sparse())
        model.optimizer.build(model.trainable_variables)
        if chunked:
            training.chunk_loss(model, chunk_size=6)
        sizes.append(made(model, tokens, targets))
    whole = ROWS * LENGTH * WORDS
    assert max(sizes[1]) >= whole  # It was looked for in the right place.
    assert 6 * WORDS in sizes[0]
    assert max(sizes[0]) < whole


# -- All else ----------------------------------------------------------------


@pytest.mark.slice
def test_calls_and_files_are_as_before(tmp_path):
    model = adapted("untied", cap=2.0)
    tokens, *_ = batch()
    before, config = model.predict(tokens, verbose=0), model.get_config()
    training.chunk_loss(model)
    assert model.predict(tokens, verbose=0).tobytes() == before.tobytes()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert model.get_config() == config
    assert not hasattr(loaded, "replaced_methods")
    assert same_bits(values(loaded.variables), values(model.variables))


def test_a_model_without_adapters_keeps_its_class_in_files():
    model, chunked = language_model(), language_model()
    training.chunk_loss(chunked)
    before, after = (
        keras.saving.serialize_keras_object(m)["registered_name"]
        for m in (model, chunked)
    )
    assert before == after


def test_adapters_come_and_go():
    model = language_model()
    training.chunk_loss(model, chunk_size=7)
    keras_peft.adapt(model, keras_peft.LoRA(2), "hidden", head=[])
    logs, _ = trained(model, sparse())
    assert logs["loss"][1] < logs["loss"][0]
    keras_peft.merge(model)
    logs, _ = trained(model, sparse())
    assert logs["loss"][1] < logs["loss"][0]


def test_restore_leaves_nothing():
    model = language_model()
    attributes = set(vars(model))
    training.chunk_loss(model)
    assert set(vars(model)) > attributes
    training.restore(model)
    assert set(vars(model)) == attributes


def test_smoothing_is_that_of_categorical_crossentropy():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 5, WORDS)).astype("float32")
    targets = rng.integers(0, WORDS, (2, 5))
    smoothed = training.SmoothedCrossentropy(0.2)
    expected = keras.losses.CategoricalCrossentropy(
        from_logits=True, label_smoothing=0.2
    )(np.eye(WORDS, dtype="float32")[targets], logits)
    found = smoothed.from_config(smoothed.get_config())(targets, logits)
    # Sums of WORDS float32 numbers in another order.
    np.testing.assert_allclose(found, expected, rtol=2**-24 * WORDS)


# Exponentials that float32 cannot hold, on either side, in one row or in all.
@pytest.mark.parametrize("shift", [0, 60, 95, -50, -95, 300, -300])
@pytest.mark.parametrize("rows", [slice(None), slice(1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_of_any_size_have_a_loss(shift, rows, dtype):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, WORDS))
    logits[rows] += shift
    logits = keras.ops.cast(logits, dtype)
    # float64 of the very numbers that are summed.
    exact = keras.ops.convert_to_numpy(keras.ops.cast(logits, "float32"))
    exact = exact.astype("float64")
    targets = rng.integers(0, WORDS, 4)
    top = exact.max(axis=1)
    total = np.log(np.exp(exact - top[:, None]).sum(axis=1)) + top
    found = training.SmoothedCrossentropy(0.0, reduction=None)(targets, logits)
    # Two roundings of numbers up to the largest logit, and of WORDS sums.
    np.testing.assert_allclose(
        found,
        total - exact[np.arange(4), targets],
        atol=2**-22 * (np.abs(exact).max() + WORDS),
    )


@pytest.mark.parametrize("size", [0, -3, 2.5])
def test_chunks_have_a_size(size):
    with pytest.raises(ValueError, match="chunk_size"):
        training.chunk_loss(language_model(), size)


def test_a_model_without_a_head_is_refused():
    inputs = keras.Input((LENGTH,))
    model = keras.Model(inputs, keras.layers.Softmax()(inputs))
    with pytest.raises(ValueError, match="from hidden states to classes"):
        training.chunk_loss(model)
    with pytest.raises(ValueError, match="from hidden states to classes"):
        training.chunk_loss(build("subclassed"))


class Squares(keras.losses.Loss):
    """A number per word."""

    def call(self, y_true, y_pred):
        return keras.ops.square(y_pred)


class Count(keras.metrics.Metric):
    """No mean over tokens."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        pass

    def result(self):
        return 0.0


REFUSED = {
    "a function": ("sparse_categorical_crossentropy", [], "keras.losses.Loss"),
    "other metric": (sparse(), [Count()], "means over tokens"),
    "more numbers": (Squares(), [], "number per token"),
}


@pytest.mark.parametrize("loss, metrics, said", REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_by_tokens_is_refused(loss, metrics, said):
    model = training.chunk_loss(language_model())
    model.compile("sgd", loss, metrics=metrics, run_eagerly=True)
    tokens, targets, _ = batch()
    with pytest.raises(ValueError, match=said):
        model.fit(tokens, targets, verbose=0)
