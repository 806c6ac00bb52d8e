"""Laws of steps that are told of full rows, and look at no mask."""

import keras
import numpy as np
import pytest
from models import build
from models import data
from models import fit
from models import summary_of
from models import values
from test_training_compiled_step import compiled_into
from test_training_compiled_step import steps_in

import keras_peft
from keras_peft import layer_tree
from keras_peft import training
from keras_peft.training import compiled_step

pytestmark = [
    pytest.mark.slice,
    pytest.mark.skipif(
        keras.config.backend() != "jax", reason="JAX chooses while it runs"
    ),
]


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """What XLA made of the steps of a model: whether each looks at masks."""
    monkeypatch.setattr(compiled_step, "is_on_gpu", lambda: True)
    compiled_into(tmp_path, monkeypatch)
    return lambda: sorted(
        "conditional(" in step.read_text() for step in steps_in(tmp_path)
    )


def padded(*rows):
    """Batches of 4 rows, of which some end with padding."""
    inputs = data("llama")[0]
    inputs["padding_mask"][:] = True
    inputs["padding_mask"][list(rows), 4:] = False
    return inputs


def trained(inputs, prepared=True, model=None, **settings):
    model = build("llama") if model is None else model
    keras_peft.adapt(model, keras_peft.LoRA(rank=2))
    if prepared:
        training.prepare(model, loss=None, attention="causal", **settings)
    optimizer = keras.optimizers.SGD(0.1)
    losses = fit(model, "llama", optimizer=optimizer, inputs=inputs)
    return losses, values(model.trainable_variables)


# `(rows that end with padding, which steps are compiled)`; batches hold 4.
BATCHES = {
    "full": ((), [False]),
    "padded": ((1, 6), [True]),
    "padded at first": ((1,), [True]),
    "padded at last": ((6,), [False, True]),
}


@pytest.mark.parametrize("name", BATCHES)
def test_steps_look_where_they_must(name, steps):
    rows, looking = BATCHES[name]
    ours, theirs = (trained(padded(*rows), each) for each in (True, False))
    assert steps() == looking
    # Float32: the same sums in another order, two epochs of them.
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    for a, b in zip(ours[1].values(), theirs[1].values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_blocks_that_are_computed_again_are_told(remat, steps):
    trained(padded(), remat=remat)
    assert steps() == [False]


def test_a_smaller_last_batch_is_told(steps):
    inputs = keras.tree.map_structure(lambda a: a[:6], padded())
    model = build("llama")
    training.prepare(model, loss=None, attention="causal")
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(True))
    targets = data("llama")[1][:6]
    keras.Model.fit(model, inputs, targets, batch_size=4, epochs=2, verbose=0)
    assert steps() == [False, False]


def test_a_step_of_the_users_own_looks(steps):
    """It may give the model other inputs than the batch."""

    class Shortened(keras.Model):
        def train_step(self, state, data):
            inputs, *rest = data
            mask = inputs["padding_mask"].at[:, 3:].set(False)
            inputs = {**inputs, "padding_mask": mask}
            return super().train_step(state, (inputs, *rest))

    base = build("llama")
    model = Shortened(base.inputs, base.outputs)
    found = trained(padded(), model=model)
    assert steps() == [True]
    assert "looks at no mask" not in summary_of(model)
    base = build("llama")
    plain = trained(padded(), False, Shortened(base.inputs, base.outputs))
    np.testing.assert_allclose(found[0], plain[0], rtol=1e-5)


def test_what_a_loss_asks_of_the_model_looks(steps):
    """It may give the model other inputs than the batch."""

    class Twice(keras.Model):
        def compute_loss(self, x, y, y_pred, *args, **kwargs):
            mask = x["padding_mask"].at[:, 3:].set(False)
            other = self({**x, "padding_mask": mask}, training=True)
            losses = [
                super(Twice, self).compute_loss(x, y, outputs, *args, **kwargs)
                for outputs in (y_pred, other)
            ]
            return sum(losses)

    losses = []
    for prepared in (True, False):
        base = build("llama")
        model = Twice(base.inputs, base.outputs)
        losses.append(trained(padded(), prepared, model)[0])
    assert steps() == [True]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_masks_within_functions_traced_apart_are_looked_at(steps):
    import jax

    model = build("llama")
    layers = layer_tree.layers_by_path(model)
    block = layers["backbone.transformer_layers.0"]
    call = block.call

    def traced_apart(*args, **kwargs):
        return jax.checkpoint(lambda: call(*args, **kwargs))()

    layer_tree.set_plain(block, "call", traced_apart)
    losses, _ = trained(padded(), model=model)
    assert steps() == [True]
    np.testing.assert_allclose(losses, trained(padded(), False)[0], rtol=1e-5)


def test_the_summary_says_so():
    model = build("llama")
    keras_peft.adapt(model, keras_peft.LoRA(rank=2))
    training.prepare(model, attention="causal")
    assert "looks at no mask" in summary_of(model)
    training.prepare(model, attention=None)
    assert "looks at no mask" not in summary_of(model)
