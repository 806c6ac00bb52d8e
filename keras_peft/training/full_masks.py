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
        self.kept = {}  # `{structure and shapes: {number of an input: array}}`

    def are_in(self, state: Any, data: Any) -> bool:
        """Whether every mask of a batch is causal and forbids no more.

        False also where that is not known: masks that depend on weights,
        steps that are not Keras' own, arrays on several devices, attention in
        functions that JAX traces apart.
        """
        import jax
        from keras.src.backend.jax.trainer import JAXTrainer

        if (
            keras.distribution.distribution() is not None
            or type(self.model).train_step is not JAXTrainer.train_step
        ):
            return False
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        leaves, structure = jax.tree.flatten(x)
        kind = structure, *((a.shape, str(a.dtype)) for a in leaves)
        if kind not in self.kept:
            self.kept[kind] = self._read(state, x)
        kept = self.kept[kind]
        return kept is not None and all(
            np.array_equal(leaves[number], array)
            for number, array in kept.items()
        )

    def _read(self, state, x):
        """The inputs that masks are made of, if these are full."""
        import jax

        weights = state[:2]
        others = len(jax.tree.leaves(weights))
        try:
            look, is_used = _what_it_takes(self._is_any_other, *weights, x)
            if any(is_used[:others]):
                return None
            used = {
                number: array
                for number, array in enumerate(jax.tree.leaves(x))
                if is_used[others + number]
            }
            if look(*used.values()):
                return None
        except jax.errors.UnexpectedTracerError:
            return None
        return {number: np.asarray(array) for number, array in used.items()}

    def _is_any_other(self, trainable, non_trainable, x):
        from jax import numpy as jnp

        settings = {}
        if self.model._call_has_training_arg:
            settings["training"] = True
        with noting_forms() as forms:
            self.model.stateless_call(trainable, non_trainable, x, **settings)
        return jnp.any(jnp.stack(forms) != 0) if forms else jnp.array(True)


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
