"""Optimizers that know the two factors of LoRA apart.

Both are Keras' AdamW, for `model.compile(optimizer=...)`; whatever is no
factor of LoRA, such as a head, they train as AdamW does.
"""

import keras
from keras import ops

from keras_peft.kernels import EmbeddingKernel
from keras_peft.methods.lora import LoRAAdapter
from keras_peft.methods.raw_weights import RawLoRAAdapter

# Added to the diagonal before a Gram matrix is inverted, as in PEFT.
_RIDGE = 1e-8


@keras.saving.register_keras_serializable(package="keras_peft")
class LoRAPlus(keras.optimizers.AdamW):
    """LoRA+: AdamW with a higher learning rate for `B` than for `A`.

    `A` is trained at `learning_rate`, `B` at `ratio * learning_rate`. In wide
    layers `A` sums over many inputs and `B` over few ranks, so that one rate
    for both is too high for `A` or too low for `B`. The higher rate goes to
    the factor that starts at zero: `B`, and on embeddings, which sum over
    nothing, `A`. Weight decay of each variable goes with its rate.

    - [Hayou et al., 2024](https://arxiv.org/abs/2402.12354)

    Args:
        learning_rate: Float or schedule; the rate of `A`. About a half of
            what suits LoRA with one rate.
        ratio: Number of at least 1; 16 is the paper's. Harder tasks, which
            need features to change, take larger ones.
        weight_decay: Float.
        **kwargs: Further arguments of `keras.optimizers.AdamW`.

    Raises:
        ValueError: if `ratio` is less than 1; when training begins, if no
            variable is a factor of LoRA.

    Example:
    >>> model.compile(keras_peft.optimizers.LoRAPlus(1e-4), loss="mse")
    """

    def __init__(
        self, learning_rate=1e-4, ratio=16.0, weight_decay=0.0, **kwargs
    ):
        if not ratio >= 1:
            raise ValueError(
                "`ratio` must be at least 1; 16 is usual. "
                f"Received: ratio={ratio!r}"
            )
        super().__init__(learning_rate, weight_decay, **kwargs)
        self.ratio = ratio

    def build(self, variables):
        if self.built:
            return
        faster = {id(moving) for _, moving, _ in _pairs(self, variables)}
        self._faster = [id(variable) in faster for variable in variables]
        super().build(variables)

    def update_step(self, gradient, variable, learning_rate):
        if self._is_faster(variable):
            learning_rate = learning_rate * self.ratio
        super().update_step(gradient, variable, learning_rate)

    def _apply_weight_decay(self, variables):
        decay = self.weight_decay
        try:
            for faster in (False, True):
                group = [v for v in variables if self._is_faster(v) is faster]
                self.weight_decay = decay * (self.ratio if faster else 1.0)
                if group and decay:
                    super()._apply_weight_decay(group)
        finally:
            self.weight_decay = decay

    def _is_faster(self, variable):
        return self._faster[self._get_variable_index(variable)]

    def get_config(self):
        return {**super().get_config(), "ratio": self.ratio}


@keras.saving.register_keras_serializable(package="keras_peft")
class LoRAFA(keras.optimizers.AdamW):
    """LoRA-FA: `A` stays as it started, `B` learns.

    AdamW sees `inverse(A.T @ A) @ gradient / scale**2` in place of the
    gradient of `B`, which makes the change of `A @ B` the one nearest to a
    step of the full kernel. On embeddings, where `A` is the factor that starts
    at zero, the two change places: `B` stays, and `A` learns from
    `gradient @ inverse(B @ B.T) / scale**2`.

    - [Zhang et al., 2023](https://arxiv.org/abs/2308.03303)

    Args:
        learning_rate: Float or schedule.
        weight_decay: Float. The factor that stays does not decay.
        **kwargs: Further arguments of `keras.optimizers.AdamW`.

    Raises:
        ValueError: when training begins, if no variable is a factor of LoRA.

    Example:
    >>> model.compile(keras_peft.optimizers.LoRAFA(1e-3), loss="mse")
    """

    def __init__(self, learning_rate=1e-3, weight_decay=0.0, **kwargs):
        super().__init__(learning_rate, weight_decay, **kwargs)

    def build(self, variables):
        if self.built:
            return
        index = {id(variable): i for i, variable in enumerate(variables)}
        pairs = _pairs(self, variables)
        self._fixed = {index[id(fixed)] for fixed, _, _ in pairs}
        self._moving = {
            index[id(moving)]: (index[id(fixed)], adapter)
            for fixed, moving, adapter in pairs
        }
        super().build(variables)

    def apply(self, grads, trainable_variables=None):
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            if not self.built:
                self.build(trainable_variables)
        variables = trainable_variables or self._trainable_variables
        grads = [
            None if grad is None else self._changed(grad, variable)
            for grad, variable in zip(grads, variables, strict=True)
        ]
        super().apply(grads, trainable_variables)

    def _changed(self, gradient, variable):
        index = self._get_variable_index(variable)
        if index in self._fixed:
            return ops.zeros_like(variable.value)
        if index not in self._moving:
            return gradient
        fixed, adapter = self._moving[index]
        fixed = ops.stop_gradient(self._trainable_variables[fixed].value)
        # A sum is dense also where TensorFlow's gradient is a few rows.
        gradient = ops.add(ops.zeros_like(variable.value), gradient)
        gradient = gradient / adapter.scale**2
        if _is_embedding(adapter):
            gram = ops.matmul(fixed, ops.transpose(fixed))
            return ops.transpose(_solve(gram, ops.transpose(gradient)))
        # Of experts, each has factors of its own.
        gram = ops.matmul(ops.swapaxes(fixed, -1, -2), fixed)
        return _solve(gram, gradient)

    def _use_weight_decay(self, variable):
        if self._get_variable_index(variable) in self._fixed:
            return False
        return super()._use_weight_decay(variable)


def _solve(gram, gradient):
    ridge = _RIDGE * ops.eye(gram.shape[-1], dtype=gram.dtype)
    return ops.solve(gram + ridge, gradient)


def _is_embedding(adapter):
    kernel = getattr(adapter, "kernel", None)  # Raw weights are several.
    return isinstance(kernel, EmbeddingKernel)


def _pairs(optimizer, variables):
    """`[(factor that starts random, factor that starts at zero, adapter)]`."""
    known = {id(variable) for variable in variables}
    adapters = {
        id(adapter): adapter
        for variable in variables
        if isinstance(
            adapter := getattr(variable, "adapter", None),
            LoRAAdapter | RawLoRAAdapter,
        )
    }
    pairs = []
    for adapter in adapters.values():
        for factors in adapter.pairs:
            if all(id(factor) in known for factor in factors):
                if _is_embedding(adapter):
                    factors = factors[::-1]
                pairs.append((*factors, adapter))
    if not pairs:
        kind = type(optimizer).__name__
        raise ValueError(
            f"`{kind}` trains the two factors of LoRA, and none of the "
            "variables is one. Call `keras_peft.adapt(model, "
            "keras_peft.LoRA())` before `fit`, or use another optimizer. "
            f"Received: {[v.path for v in variables][:4]} of {len(variables)}"
        )
    return pairs
