"""The loss over a large vocabulary, without logits of the whole batch."""

import contextlib
import dataclasses
import functools
from typing import Any

import keras
from keras import ops

from keras_peft import layer_tree
from keras_peft.training import chunks
from keras_peft.training.gathering import gathered
from keras_peft.training.head import SplitModel
from keras_peft.training.head import split_model
from keras_peft.training.smoothed import crossentropy


def chunk_loss(model: keras.Model, chunk_size: int = 1024) -> keras.Model:
    r"""Computes head and loss together, a few tokens at a time, in place.

    A causal language model of `V` words turns `N` tokens into `N * V` logits,
    their gradient and their softmax, which is often more memory than all the
    rest of an adapted model. In `fit` and `evaluate` of a model with a chunked
    loss no more than `chunk_size * V` of them exist. The loss is the one that
    `compile` was given, with its weights, masks and reduction:

        loss = reduce(l(y[t], cap(h[t] @ W)) for each token t)

    The gradient by `h` is computed in the forward pass, chunk by chunk, so a
    frozen head costs no additional product. If the head trains, as a part of
    it or with an adapter on it, the backward pass computes each chunk again.

    Calling the model, `predict` and `generate()` go on as before, and what is
    saved knows nothing of it. `keras_peft.training.restore` undoes it. Metrics
    that are means over tokens, such as `SparseCategoricalAccuracy`, are
    computed with the chunk.

    - [Hsu et al., 2024](https://arxiv.org/abs/2410.10989) describe a fused
      kernel of the same idea.

    Args:
        model: A functional model that ends with a `Dense` layer or a reversed
            embedding, soft-capped or not: most causal language models of
            keras-hub. Adapted or not.
        chunk_size: Positive integer. Tokens whose logits exist at once, on
            each device. 1024 is enough to keep a GPU busy.

    Returns:
        `model`.

    Raises:
        ValueError: if the model ends otherwise; in `fit`, if the loss is no
            `keras.losses.Loss` of one number per token, or a metric is no
            mean over tokens.

    Example:
    >>> keras_peft.training.chunk_loss(causal_lm)
    >>> causal_lm.compile("adam", loss="auto")
    >>> causal_lm.fit(inputs, targets)
    """
    chunked = _ChunkedLoss(checked_split(model, chunk_size), chunk_size)
    why = f"loss in chunks of {chunk_size} tokens"
    for name in ("call", "compute_loss", "compute_metrics"):
        layer_tree.replace_method(model, name, getattr(chunked, name), why)
    for name in ("train_step", "test_step"):
        step = functools.partial(chunked.step, name)
        layer_tree.replace_method(model, name, step)
    layer_tree.forget_compiled(model, optimizer=False)
    return model


def checked_split(model: keras.Model, chunk_size: int) -> SplitModel:
    """`model` in two parts, if its loss can be computed in chunks."""
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(
            "`chunk_size` must be a positive number of tokens. "
            f"Received: chunk_size={chunk_size!r}"
        )
    return split_model(model)


_AS_IT_IS = contextlib.nullcontext()


class _ChunkedLoss:
    """The methods of a model whose loss is computed in chunks."""

    def __init__(self, split, chunk_size):
        self.split = split
        self.chunk_size = chunk_size
        self.in_step = False

    def step(self, name, model, *args):
        """`train_step` or `test_step`: here the model gives hidden states."""
        self.in_step = True
        try:
            return layer_tree.method_of_class(model, name)(*args)
        finally:
            self.in_step = False

    def call(self, model, *args, **kwargs):
        if self.in_step:
            return self.split.trunk.call(*args, **kwargs)
        return layer_tree.method_of_class(model, "call")(*args, **kwargs)

    def compute_loss(
        self,
        model,
        x=None,
        y=None,
        y_pred=None,
        sample_weight=None,
        training=True,
    ):
        base = layer_tree.method_of_class(model, "compute_loss")
        if not self.in_step:
            return base(x, y, y_pred, sample_weight, training=training)
        loss = _checked_loss(model)
        if training and layer_tree.is_random(self.split.head):
            raise ValueError(
                "A head with dropout cannot be computed in chunks. Leave the "
                "adapter on it without dropout, or train without a chunked "
                f"loss. Received: head {self.split.head.name!r}"
            )
        if layer_tree.is_adapted(model):
            raise ValueError(
                "An adapter around the whole model stands outside of its head. "
                "Adapt its backbone instead, or call "
                "`keras_peft.training.restore(model)`. "
                f"Received: adapters {list(model.adapters)}"
            )
        metrics = layer_tree.compiled_metrics(model, y, self.split.outputs)
        _check_metrics(metrics)
        tokens = self._per_token(loss, metrics, y, y_pred, training)
        _update(metrics, tokens, sample_weight)
        masks = [m for m in (tokens.mask, tokens.valid) if m is not None]
        if masks:
            mask = functools.reduce(ops.logical_and, masks)
            layer_tree.set_keras_mask(tokens.losses, mask)
        given = _Given(loss.name, loss.reduction, loss.dtype)
        with layer_tree.other_loss(model, given):
            return base(x, y, tokens.losses, sample_weight, training=training)

    def compute_metrics(self, model, x, y, y_pred, sample_weight=None):
        if self.in_step:  # Updated with the loss.
            return model.get_metrics_result()
        base = layer_tree.method_of_class(model, "compute_metrics")
        return base(x, y, y_pred, sample_weight)

    def _per_token(self, loss, metrics, y, hidden, training):
        """`(losses, which of them count or None, values of the metrics)`."""
        shape = ops.shape(hidden)[:-1]
        others = [_targets_of(y, hidden)]
        mask = layer_tree.get_keras_mask(hidden)
        if mask is not None:
            # TensorFlow computes nothing again of booleans.
            others.append(ops.cast(ops.reshape(mask, (-1,)), "int32"))
        seen = {}

        def function(values, hidden, targets, mask=None):
            mask = None if mask is None else ops.cast(mask, "bool")
            pairs = list(zip(variables, values, strict=True))
            with layer_tree.StandIns(pairs) if pairs else _AS_IT_IS:
                logits, seen["masked"] = self.split.logits(hidden, mask)
            losses, valid = _losses(loss, targets, logits)
            seen["ignores"] = valid is not None
            valid = ops.ones_like(losses) if valid is None else valid
            means = [_values(metric, targets, logits) for metric, _ in metrics]
            return [ops.cast(n, "float32") for n in (losses, valid, *means)]

        variables = self.split.head.trainable_variables if training else []
        frozen = functools.partial(function, [])
        arrays = ops.reshape(hidden, (-1, hidden.shape[-1])), others
        size = self.chunk_size
        with gathered(self.split.head):  # Once, and not for every chunk.
            if variables:
                values = layer_tree.values_of(variables)
                numbers = chunks.recomputed(function, *arrays, values, size)
            elif training:
                numbers = chunks.differentiable(frozen, *arrays, size)
            else:
                numbers = chunks.plain(frozen, *arrays, size)
        losses, valid, *means = (ops.reshape(n, shape) for n in numbers)
        return _Tokens(
            losses,
            means,
            mask=ops.cast(mask, "bool") if seen["masked"] else None,
            valid=ops.cast(valid, "bool") if seen["ignores"] else None,
        )


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """Numbers of all tokens.

    Attributes:
        losses: Their losses.
        means: What each metric is the mean of.
        mask: Which of them the mask of the logits keeps, or `None` for all.
        valid: Which of them the loss does not ignore, or `None` for all.
    """

    losses: Any
    means: list[Any]
    mask: Any
    valid: Any


def _update(metrics, tokens, sample_weight):
    for (metric, weighted), means in zip(metrics, tokens.means, strict=True):
        weights = sample_weight if weighted else None
        if tokens.mask is not None:
            kept = ops.cast(tokens.mask, "float32")
            if weights is not None:
                # Weights may be one per row.
                weights = ops.convert_to_tensor(weights, "float32")
                rest = (1,) * (len(kept.shape) - len(weights.shape))
                weights = ops.reshape(weights, (*ops.shape(weights), *rest))
                kept = kept * weights
            weights = kept
        values = ops.stop_gradient(means)
        keras.metrics.Mean.update_state(metric, values, weights)


class _Given(keras.losses.Loss):
    """Reduces losses of tokens that are known."""

    def call(self, y_true, y_pred):
        return y_pred


def _checked_loss(model):
    loss = model.loss
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    if not isinstance(loss, keras.losses.Loss):
        raise ValueError(
            "A chunked loss needs one object of `keras.losses.Loss`, such as "
            "`keras.losses.SparseCategoricalCrossentropy(from_logits=True)`. "
            f"Received: loss={model.loss!r}"
        )
    return loss


def _check_metrics(metrics):
    kinds = keras.metrics.MeanMetricWrapper
    wrong = [m.name for m, _ in metrics if not isinstance(m, kinds)]
    if wrong:
        raise ValueError(
            "Where the loss is chunked, metrics must be means over tokens, "
            "such as `keras.metrics.SparseCategoricalAccuracy`. Leave the "
            f"others out of `compile`. Received: metrics {wrong}"
        )


def _targets_of(y, hidden):
    rank = len(hidden.shape) - 1
    shape = tuple(getattr(y, "shape", ()))
    if len(shape) == rank + 1 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != rank:
        raise ValueError(
            "A chunked loss needs one class number per token. Received: "
            f"targets of shape {shape} for hidden states of shape "
            f"{tuple(hidden.shape)}"
        )
    return ops.reshape(y, (-1,))


def _losses(loss, targets, logits):
    """`(losses, mask or None)` as `keras.losses.Loss` has them before sums."""
    targets = ops.convert_to_tensor(targets, loss.dtype)
    if _is_crossentropy(loss):
        losses = crossentropy(targets, logits, ignore_class=loss.ignore_class)
    else:
        losses = loss.call(targets, ops.convert_to_tensor(logits, loss.dtype))
    if len(losses.shape) != len(targets.shape):
        raise ValueError(
            "A chunked loss needs a loss with one number per token. Received: "
            f"{type(loss).__name__} with numbers of shape "
            f"{tuple(losses.shape)} for {tuple(targets.shape)} tokens"
        )
    return losses, layer_tree.get_keras_mask(losses)


def _is_crossentropy(loss):
    """Whether it is the one of Keras that has a faster gradient on JAX.

    Keras multiplies by one number for every class of every token there.
    """
    return (
        keras.config.backend() == "jax"
        and type(loss) is keras.losses.SparseCategoricalCrossentropy
        and loss.from_logits
    )


def _values(metric, targets, logits):
    targets, logits = (ops.cast(x, metric.dtype) for x in (targets, logits))
    values = layer_tree.function_of_metric(metric)(targets, logits)
    return ops.reshape(values, (-1,))
