"""A callback that shares out AdaLoRA's ranks among the layers."""

import keras
import numpy as np
from keras import ops

from keras_peft import adapter_state
from keras_peft import importance
from keras_peft.compiling import compiled
from keras_peft.methods.adalora import AdaLoRA
from keras_peft.methods.settings import check_positive_integer


class RankAllocator(keras.callbacks.Callback):
    """Prunes AdaLoRA to the singular values that matter most.

    The importance of a weight is how much the loss depends on it,
    `I = |weight * gradient|`, smoothed over the steps, times how uncertain
    that is:

    ```
    sensitivity = beta1 * sensitivity + (1 - beta1) * I
    uncertainty = beta2 * uncertainty + (1 - beta2) * |I - sensitivity|
    importance  = sensitivity * uncertainty
    ```

    That of a singular value is its own, plus the mean over its column of `P`,
    plus the mean over its row of `Q`. Every `interval` steps the least
    important ones of all layers are set to zero; until the last time they may
    grow again. How many are left falls from all of them, after `warmup_steps`,
    with the cube of the remaining steps, to `target_rank` per layer on average,
    when `final_steps` are left (or training ends): then those that are zero
    stay so.

    The optimizer keeps both sums, twice the adapter's size, while training
    lasts. Put the callback before `keras_peft.AdapterCheckpoint`, which then
    saves and restores them.

    - [Zhang et al., 2023](https://arxiv.org/abs/2303.10512), section 3.3

    Args:
        target_rank: Positive integer. How many singular values per layer are
            left, on average.
        warmup_steps: Integer. Steps before the first pruning.
        final_steps: Integer. Steps after the last one.
        interval: Positive integer. Steps between two prunings.
        beta1: Float in `(0, 1)`. Smoothing of the sensitivity.
        beta2: Float in `(0, 1)`. Smoothing of the uncertainty.
        total_steps: Steps of the whole training, or `None` for the batches of
            all epochs, if `fit` can count them.
        name: Which of the model's adapters.

    Attributes:
        ranks: `{path: rank}` of the layers, after the latest pruning: how many
            singular values it left.

    Raises:
        ValueError: if an argument is out of its range; when training starts,
            if the adapter is not AdaLoRA, does not train, has less ranks than
            the target, or the steps leave none to prune in.

    Example:
    >>> allocator = keras_peft.RankAllocator(target_rank=4, warmup_steps=100)
    >>> model.fit(x, y, epochs=3, callbacks=[allocator])
    >>> allocator.ranks
    """

    def __init__(
        self,
        target_rank=8,
        warmup_steps=0,
        final_steps=0,
        interval=10,
        beta1=0.85,
        beta2=0.85,
        total_steps=None,
        name="default",
    ):
        super().__init__()
        check_positive_integer("target_rank", target_rank, "8")
        check_positive_integer("interval", interval, "10")
        for beta in (beta1, beta2):
            if not 0 < beta < 1:
                raise ValueError(
                    "`beta1` and `beta2` must lie between 0 and 1. "
                    f"Received: beta1={beta1!r}, beta2={beta2!r}"
                )
        self.target_rank = target_rank
        self.warmup_steps = warmup_steps
        self.final_steps = final_steps
        self.interval = interval
        self.betas = beta1, beta2
        self.total_steps = total_steps
        self.name = name
        self.ranks = {}

    def on_train_begin(self, logs=None):
        model = self.model
        adapters = self._adapters(model)
        self._plan(adapters)
        learned = [v for leaf in adapters.values() for v in leaf.learned]
        self.importance = importance.watch(model, learned, self.betas)
        # One program each, as the layers may be hundreds.
        self._scores, self._cut = compiled(_scores), compiled(_cut)
        self.pruned = False

    def _adapters(self, model):
        """`{path: adapter}` of an AdaLoRA that trains."""
        adapter = adapter_state.named(model, self.name)
        if not isinstance(adapter.method, AdaLoRA):
            raise ValueError(
                "`RankAllocator` prunes adapters of `keras_peft.AdaLoRA`. "
                f"Received: name={self.name!r}, of {adapter.method}"
            )
        if not (adapter.trainable and self.name in model.peft.active):
            raise ValueError(
                "The adapter does not train. Make it active with "
                "`keras_peft.set_adapter`, or load it with `trainable=True`. "
                f"Received: name={self.name!r}"
            )
        return adapter_state.leaves(model, self.name)

    def _plan(self, adapters):
        """Sets the two budgets, and the step from which the last one holds."""
        total = self._total()
        self.last_step = total - self.final_steps
        if self.final_steps < 0 or not 0 <= self.warmup_steps < self.last_step:
            raise ValueError(
                "`warmup_steps` and `final_steps` must leave steps to prune "
                f"in, of {total}. Received: warmup_steps={self.warmup_steps}, "
                f"final_steps={self.final_steps}"
            )
        masks = [_numpy(leaf.adalora_mask) for leaf in adapters.values()]
        self.first_budget = int(np.sum(masks))
        self.last_budget = self.target_rank * len(adapters)
        if self.last_budget > self.first_budget:
            raise ValueError(
                f"`target_rank` asks for {self.last_budget} singular values, "
                f"and the adapter has {self.first_budget}. Use a larger `rank` "
                f"in `AdaLoRA`. Received: target_rank={self.target_rank}"
            )

    def _total(self):
        if self.total_steps is not None:
            return self.total_steps
        epochs, steps = self.params["epochs"], self.params["steps"]
        if steps is None:
            raise ValueError(
                "The number of batches is not known before the first epoch. "
                "Pass `total_steps`. Received: total_steps=None"
            )
        return epochs * steps

    def on_epoch_begin(self, epoch, logs=None):
        # After a checkpoint was restored, which sets the steps.
        self.step = self._steps()
        self.pruned = self.step >= self.last_step

    def _steps(self):
        return int(_numpy(self.importance.steps))

    def on_train_batch_end(self, batch, logs=None):
        model, before = self.model, self.step
        self.step = self._steps()
        if self.pruned or self.step <= self.warmup_steps:
            return
        last = self.step >= self.last_step
        if last or self.step // self.interval > before // self.interval:
            self._prune(model, last)

    def on_train_end(self, logs=None):
        model = self.model
        if not self.pruned:
            self._prune(model, last=True)
        importance.unwatch(model)

    def budget(self, step):
        """How many singular values may be other than zero after a step."""
        warmup = self.warmup_steps
        share = (step - warmup) / (self.last_step - warmup)
        rest = (1 - min(max(share, 0), 1)) ** 3
        excess = self.first_budget - self.last_budget
        return self.last_budget + int(excess * rest)

    def _prune(self, model, last):
        adapters = adapter_state.leaves(model, self.name)
        leaves = adapters.values()
        sums = [
            [_tensors(self.importance.of(v)) for v in leaf.learned]
            for leaf in leaves
        ]
        masks = _tensors(leaf.adalora_mask for leaf in leaves)
        scores = _numpy(self._scores(sums, masks))
        budget = self.last_budget if last else self.budget(self.step)
        ordered = np.argsort(-scores, kind="stable")
        kept = np.zeros(len(scores), "float32")
        kept[ordered[:budget]] = 1.0
        kept[scores == -np.inf] = 0.0
        left = self._cut(_tensors(leaf.adalora_e for leaf in leaves), kept)
        self.ranks = {}
        for (path, leaf), values in zip(adapters.items(), left, strict=True):
            (rank,) = leaf.adalora_mask.shape
            mask, kept = kept[:rank], kept[rank:]
            leaf.adalora_e.assign(values)
            if last:
                leaf.adalora_mask.assign(mask)
            self.ranks[path] = int(mask.sum())
        self.pruned = last


def _scores(sums, masks):
    """The importance of every singular value, layer after layer.

    `sums` has, for each layer, `(sensitivity, uncertainty)` of `P`, `E` and
    `Q`. A value that is gone gets `-inf`.
    """
    found = []
    for pairs, mask in zip(sums, masks, strict=True):
        p, e, q = (ops.multiply(*pair) for pair in pairs)
        score = e + ops.mean(p, axis=0) + ops.mean(q, axis=1)
        found.append(ops.where(mask > 0, score, -np.inf))
    return ops.concatenate(found)


def _cut(values, kept):
    """`values` of each layer, zero where they are not `kept`."""
    ends = np.cumsum([value.shape[0] for value in values])[:-1]
    parts = ops.split(kept, ends.tolist())
    return [v * part for v, part in zip(values, parts, strict=True)]


def _tensors(variables):
    return [ops.convert_to_tensor(variable) for variable in variables]


def _numpy(variable):
    return ops.convert_to_numpy(variable)
