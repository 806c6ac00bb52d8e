"""Cross-entropy of class numbers, smoothed."""

import keras
from keras import ops

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
        if len(y_true.shape) == len(y_pred.shape):
            y_true = ops.squeeze(y_true, axis=-1)
        classes = ops.cast(y_true, "int32")
        valid = None
        if self.ignore_class is not None:
            valid = ops.not_equal(classes, self.ignore_class)
            classes = ops.where(valid, classes, 0)
        chosen = ops.take_along_axis(
            y_pred, ops.expand_dims(classes, -1), axis=-1
        )
        target = (1 - self.label_smoothing) * ops.squeeze(chosen, -1)
        target = target + self.label_smoothing * ops.mean(y_pred, axis=-1)
        losses = ops.logsumexp(y_pred, axis=-1) - target
        if valid is not None:
            losses = ops.where(valid, losses, 0.0)
            set_keras_mask(losses, valid)
        return losses

    def get_config(self):
        return {
            **super().get_config(),
            "label_smoothing": self.label_smoothing,
            "ignore_class": self.ignore_class,
        }
