"""Cross-entropy of class numbers, smoothed or not."""

import functools
from typing import Any

import keras
from keras import ops

from keras_peft.compiling import as_computed
from keras_peft.layer_tree import set_keras_mask


@keras.saving.register_keras_serializable(package="keras_peft")
class SmoothedCrossentropy(keras.losses.Loss):
    r"""Cross-entropy of logits and class numbers, with label smoothing.

    What `keras.losses.CategoricalCrossentropy(from_logits=True,
    label_smoothing=e)` computes, without a vector of `V` numbers per token:

        loss = logsumexp(z) - (1 - e) * z[y] - e * mean(z)

    It works in `model.compile` of any model, and in chunks.

    - [Szegedy et al., 2015](https://arxiv.org/abs/1512.00567)

    Args:
        label_smoothing: Float in `[0, 1)`; 0.1 is usual. The share of the
            target that is spread evenly over all classes.
        ignore_class: Optional class number whose tokens do not count.
        **kwargs: `reduction`, `name` and `dtype` of `keras.losses.Loss`.

    Raises:
        ValueError: if `label_smoothing` is outside `[0, 1)`.

    Example:
    >>> model.compile("adam", keras_peft.training.SmoothedCrossentropy(0.1))
    """

    def __init__(
        self,
        label_smoothing=0.1,
        ignore_class=None,
        name="smoothed_crossentropy",
        **kwargs,
    ):
        if not 0 <= label_smoothing < 1:
            raise ValueError(
                "`label_smoothing` must be at least 0 and below 1. "
                f"Received: label_smoothing={label_smoothing!r}"
            )
        super().__init__(name=name, **kwargs)
        self.label_smoothing = label_smoothing
        self.ignore_class = ignore_class

    def call(self, y_true, y_pred):
        return crossentropy(
            y_true, y_pred, self.label_smoothing, self.ignore_class
        )

    def get_config(self):
        return {
            **super().get_config(),
            "label_smoothing": self.label_smoothing,
            "ignore_class": self.ignore_class,
        }


def crossentropy(
    y_true: Any,
    y_pred: Any,
    label_smoothing: float = 0.0,
    ignore_class: int | None = None,
) -> Any:
    """`SmoothedCrossentropy` of each token, before it is reduced."""
    if len(y_true.shape) == len(y_pred.shape):
        y_true = ops.squeeze(y_true, axis=-1)
    classes = ops.cast(y_true, "int32")
    valid = None
    if ignore_class is not None:
        valid = ops.not_equal(classes, ignore_class)
        classes = ops.where(valid, classes, 0)
    is_jax = keras.config.backend() == "jax"
    compute = _on_jax() if is_jax else _crossentropy
    losses = compute(y_pred, classes, label_smoothing)
    if valid is not None:
        losses = ops.where(valid, losses, 0.0)
        set_keras_mask(losses, valid)
    return losses


def _crossentropy(logits, classes, smoothing):
    total = ops.logsumexp(logits, axis=-1)
    return total - _target_logit(logits, classes, smoothing)


def _target_logit(logits, classes, smoothing):
    """The mean logit, by the shares that the classes have of the target."""
    chosen = ops.take_along_axis(logits, ops.expand_dims(classes, -1), axis=-1)
    found = (1 - smoothing) * ops.squeeze(chosen, -1)
    if smoothing:
        found = found + smoothing * ops.mean(logits, axis=-1)
    return found


# Float32 takes exponentials below 1e-38 for 0: beside a sum above this, a
# million of these are nothing.
_LEAST_SUM = 1e-25


@functools.cache
def _on_jax():
    """`_crossentropy`, with a gradient of one pass over the logits.

    As Keras has it on JAX, a class that does not exist costs nothing. Sums are
    in float32 at least. On one device, the maximum is taken off only where
    exponentials leave its range: one more pass over the logits.
    """
    import jax
    from jax import numpy as jnp

    def wide(logits):
        return logits.astype(jnp.promote_types(logits.dtype, "float32"))

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def compute(logits, classes, smoothing):
        return forward(logits, classes, smoothing)[0]

    def forward(logits, classes, smoothing):
        exist = (classes >= 0) & (classes < logits.shape[-1])
        total = logsumexp(logits)
        existing = jnp.where(exist, classes, 0)
        losses = total - _target_logit(wide(logits), existing, smoothing)
        kept = logits, classes, total, exist
        return jnp.where(exist, losses, 0), kept

    def backward(smoothing, kept, upstream):
        logits, classes, total, exist = kept
        upstream = jnp.where(exist, upstream, 0)
        axis = logits.ndim - 1
        numbers = jax.lax.broadcasted_iota("int32", logits.shape, axis)
        is_target = numbers == classes[..., None]
        target = jnp.where(is_target, 1 - smoothing, 0)
        target = target + smoothing / logits.shape[-1]
        gradient = jnp.exp(wide(logits) - total[..., None]) - target
        gradient = upstream[..., None] * gradient
        return gradient.astype(logits.dtype), None

    def logsumexp(logits):
        if keras.distribution.distribution() is not None:
            return shifted(logits)
        total = jnp.exp(wide(logits)).sum(axis=-1)
        is_exact = jnp.all((total > _LEAST_SUM) & (total < jnp.inf))
        return jax.lax.cond(is_exact, of_sums, of_logits, logits, total)

    def of_sums(logits, total):
        return jnp.log(total)

    def of_logits(logits, total):
        # Otherwise XLA computes both, and chooses.
        return shifted(as_computed(logits))

    def shifted(logits):
        return jax.nn.logsumexp(wide(logits), axis=-1)

    compute.defvjp(forward, backward)
    return compute
