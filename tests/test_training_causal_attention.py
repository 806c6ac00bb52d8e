"""Laws of causal attention without masks: the same numbers, whatever pads."""

import keras
import numpy as np
import pytest
from models import build
from models import data
from models import fit
from models import kept_on_jax
from models import loss_on_jax
from models import values

from keras_peft import layer_tree
from keras_peft import training
from keras_peft.training import attention_forms

BACKEND = keras.config.backend()
on_jax = pytest.mark.skipif(BACKEND != "jax", reason="for JAX")
LENGTH = 6


def masks():
    """`{name: (mask of [rows, 1, length, length], the form it needs)}`."""
    causal = np.tril(np.ones((2, 1, LENGTH, LENGTH), bool))
    ends, front, hole, window, empty = (causal.copy() for _ in range(5))
    ends[1, ..., 4:] = False
    front[1, ..., :2] = False
    hole[1, ..., 2] = False
    window &= ~np.tril(np.ones((LENGTH, LENGTH), bool), -3)
    empty[1] = False
    return {
        "whole rows": (causal, 0),
        "one mask for all": (causal[:1], 0),
        "padding at the end": (ends, 1),
        "padding in front": (front, 2),
        "a hole": (hole, 2),
        "a window": (window, 2),
        "an empty row": (empty, 2),
        "both directions": (np.ones_like(causal), 2),
    }


@pytest.mark.slice
@on_jax
@pytest.mark.parametrize("kept", [0, np.inf])
@pytest.mark.parametrize("name", masks())
def test_attention_is_that_of_keras_for_every_mask(name, kept, monkeypatch):
    """Whether the backward pass computes again or is given all it needs."""
    import jax

    monkeypatch.setattr(attention_forms, "_KEPT", kept)
    mask, form = masks()[name]
    assert attention_forms.form_of(mask) == form
    rng = np.random.default_rng(0)
    query, upstream = rng.normal(size=(2, 2, LENGTH, 4, 8)).astype("float32")
    key, value = rng.normal(size=(2, 2, LENGTH, 2, 8)).astype("float32")

    def ours(query, key, value):
        return attention_forms.attend(query, key, value, mask, 0.3)

    def of_keras(query, key, value):
        key, value = (keras.ops.repeat(x, 2, axis=2) for x in (key, value))
        return keras.ops.dot_product_attention(
            query, key, value, mask=mask, scale=0.3
        )

    found, expected = (
        (outputs, *pull(upstream))
        for outputs, pull in (
            jax.vjp(function, query, key, value)
            for function in (ours, of_keras)
        )
    )
    for a, b in zip(found, expected, strict=True):
        # Float32: the same sums of a few dozen numbers in another order.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slice
@on_jax
@pytest.mark.parametrize("kept, softmaxes", [(0, 6), (np.inf, 3)])
def test_what_is_kept_is_not_computed_again(kept, softmaxes, monkeypatch):
    import jax

    monkeypatch.setattr(attention_forms, "_KEPT", kept)
    mask, _ = masks()["whole rows"]
    query, key, value = np.ones((3, 2, LENGTH, 4, 8), "float32")

    def total(*arrays):
        return attention_forms.attend(*arrays, mask, 0.3).sum()

    program = str(jax.make_jaxpr(jax.grad(total))(query, key, value))
    # One of each form in the forward pass, and again in the backward pass.
    assert program.count("= exp ") == softmaxes


def trained(name, attention, pad):
    model = build(name)
    inputs, _ = data(name)
    if pad is not None:
        inputs["padding_mask"][1:, pad] = False
    if attention:
        training.causal_attention(model)
    losses = fit(
        model, name, optimizer=keras.optimizers.SGD(0.1), inputs=inputs
    )
    return losses, values(model.trainable_variables)


@on_jax
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("pad", [None, slice(4, None), slice(0, 2)])
def test_models_train_as_before(name, pad):
    ours, theirs = (trained(name, each, pad) for each in (True, False))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    for a, b in zip(ours[1].values(), theirs[1].values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert ours[0][-1] < ours[0][0]


@pytest.mark.slice
@on_jax
def test_shared_keys_are_kept_once():
    import jax

    kept = []
    for attention in (True, False):
        model = build("llama")
        if attention:
            training.causal_attention(model)
        inputs = data("llama")[0]
        loss, state = loss_on_jax(model, inputs)
        program = str(jax.make_jaxpr(jax.grad(loss))(state))
        assert ("cond[" in program) == attention
        kept.append(kept_on_jax(model, inputs))
    assert kept[0] < kept[1]


@pytest.mark.slice
def test_other_backends_are_refused():
    if BACKEND == "jax":
        with pytest.raises(ValueError, match="no transformer blocks"):
            training.causal_attention(build("functional"))
        return
    model = build("llama")
    with pytest.raises(ValueError, match="Only JAX"):
        training.causal_attention(model)
    layers = layer_tree.layers_by_path(model).values()
    assert not any(layer_tree.restore_methods(layer) for layer in layers)
