"""Batches whose rows are full, so that their attention masks are causal."""

from typing import Any

import keras
import numpy as np

from keras_peft.training.attention_forms import noting_forms


class FullMasks:
    """Knows before a step which masks it will find.

    The first batch of a shape is looked at as a whole, and kept as far as
    masks are made of it. Later ones are compared with that.
    """

    def __init__(self, model):
        self.model = model
        # `{structure and shapes: (masks, {number of an input: array})}`.
        self.kept = {}

    def count(self, state: Any, data: Any) -> int:
        """Masks of a step, from the first on, that are causal and no more.

        All that the model makes of the batch, or 0: also where that is not
        known, for masks that depend on weights, steps that are not Keras' own,
        arrays on several devices, attention in functions that JAX traces apart.
        """
        import jax

        if not may_know_masks(self.model):
            return 0
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        leaves, structure = jax.tree.flatten(x)
        kind = structure, *((a.shape, str(a.dtype)) for a in leaves)
        if kind not in self.kept:
            self.kept[kind] = self._read(state, x)
        count, kept = self.kept[kind]
        is_known = all(
            np.array_equal(leaves[number], array)
            for number, array in kept.items()
        )
        return count if is_known else 0

    def _read(self, state, x):
        """`(masks, the inputs that they are made of)`; no masks if not full."""
        import jax

        weights = state[:2]
        others = len(jax.tree.leaves(weights))
        count = 0
        try:
            look, is_used = _what_it_takes(self._full, *weights, x)
            used = {
                number: array
                for number, array in enumerate(jax.tree.leaves(x))
                if is_used[others + number]
            }
            if not any(is_used[:others]):
                count = int(look(*used.values()))
        except jax.errors.UnexpectedTracerError:
            pass  # Traced apart.
        if not count:
            return 0, {}
        return count, {n: np.asarray(array) for n, array in used.items()}

    def _full(self, trainable, non_trainable, x):
        """The number of masks, or 0 if one is not full."""
        from jax import numpy as jnp

        settings = {}
        if self.model._call_has_training_arg:
            settings["training"] = True
        with noting_forms() as forms:
            self.model.stateless_call(trainable, non_trainable, x, **settings)
        are_full = jnp.array([form == 0 for form in forms]).all()
        return jnp.where(are_full, len(forms), 0)


def may_know_masks(model: keras.Model) -> bool:
    """Whether one device takes steps of a model, and as Keras does."""
    names = "train_step", "compute_loss_and_updates", "stateless_call"
    is_usual = all(
        getattr(type(model), name) is getattr(keras.Model, name)
        for name in names
    )
    return is_usual and keras.distribution.distribution() is None


def _what_it_takes(function, *args):
    """`(function of the arrays it takes, whether each array is one)`."""
    import jax
    from jax.extend.core import ClosedJaxpr
    from jax.extend.core import jaxpr_as_fun
    from jax.interpreters.partial_eval import dce_jaxpr

    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args
    )
    traced = jax.make_jaxpr(function)(*shapes)
    program, is_used = dce_jaxpr(traced.jaxpr, [True])
    run = jaxpr_as_fun(ClosedJaxpr(program, traced.consts))
    return jax.jit(lambda *arrays: run(*arrays)[0]), is_used
