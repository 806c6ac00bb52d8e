"""Token tuning: some rows of an embedding train."""

import keras
import numpy as np
from keras import ops

from keras_peft.kernels import kernel_of
from keras_peft.methods.adapter import KernelAdapter
from keras_peft.methods.method import Method


@keras.saving.register_keras_serializable(package="keras_peft")
class TokenTuning(Method):
    """Trainable vectors of chosen tokens.

    A learned row is added to the embedding of each token in `token_ids`; all
    other rows stay frozen. Where the output embedding is tied to the input
    (`ReversibleEmbedding`), the logits of these tokens change with it. For new
    or special tokens, usually next to another adapter of the other layers:
    `keras_peft.set_adapter(model, ["tokens", "lora"])`.

    Trainable parameters per layer: `len(token_ids) * features`. Nothing of the
    vocabulary's size is trained or given a gradient. The start is the base,
    bit for bit. By default the token embedding is adapted: the layers called
    `token_embedding`, or else the largest embedding.

    Args:
        token_ids: List of the tokens' ids, each once.

    Raises:
        ValueError: if `token_ids` is empty, holds an id twice or something
            that is no id, and from `adapt` if an id lies outside of the
            vocabulary.

    Example:
    >>> keras_peft.adapt(model, keras_peft.TokenTuning([50257, 50258]))
    """

    def __init__(self, token_ids):
        given = list(token_ids)
        known = all(isinstance(t, int | np.integer) and t >= 0 for t in given)
        if not given or not known:
            raise ValueError(
                "`token_ids` must be a list of at least one token id, each an "
                f"integer of at least 0. Received: token_ids={token_ids!r}"
            )
        if len(set(given)) < len(given):
            twice = sorted({t for t in given if given.count(t) > 1})
            raise ValueError(
                "`token_ids` must hold each id once. "
                f"Received: token_ids={token_ids!r}, more than once: {twice}"
            )
        self.token_ids = [int(token) for token in given]

    def accepts(self, layer):
        return isinstance(layer, keras.layers.Embedding)

    def default_targets(self, candidates):
        layers = candidates.adaptable
        named = [p for p, la in layers.items() if la.name == "token_embedding"]
        rows = {path: kernel_of(la).inputs for path, la in layers.items()}
        return named or sorted(rows, key=lambda path: -rows[path])[:1]

    def objection(self, path, layer):
        size = kernel_of(layer).inputs
        outside = [token for token in self.token_ids if token >= size]
        if outside:
            shown = ", ".join(map(str, outside[:5]))
            return f"its vocabulary of {size} has no tokens {shown}"
        return None

    def shapes(self, path, layer):
        return {"token_change": (len(self.token_ids), kernel_of(layer).outputs)}

    def create(self, path, layer, name):
        return TokenAdapter(self, path, layer, name)


class TokenAdapter(KernelAdapter):
    """The token tuning of one embedding."""

    def __init__(self, method, path, layer, name):
        self.token_ids = np.array(method.token_ids)
        super().__init__(layer, method.shapes(path, layer), name)

    def build_weights(self, shapes):
        super().build_weights(shapes)
        # By token, the row of its change; the last row stands for no change.
        self.row = self.add_weight(
            name="row",
            shape=(self.kernel.inputs,),
            initializer="zeros",
            dtype="int32",
            trainable=False,
        )

    def read_base(self):
        count = len(self.token_ids)
        rows = np.full(self.kernel.inputs, count, "int32")
        rows[self.token_ids] = np.arange(count)
        self.row.assign(rows)

    def call(self, inputs, outputs, reverse=False, training=None):
        dtype = outputs.dtype
        change = ops.cast(self.token_change * self.strength, dtype)
        if reverse:
            hidden = ops.matmul(ops.cast(inputs, dtype), ops.transpose(change))
            none = ops.zeros_like(hidden[..., :1])
            hidden = ops.concatenate([hidden, none], axis=-1)
            return ops.take(hidden, self.row, axis=-1)
        change = ops.concatenate([change, ops.zeros_like(change[:1])])
        rows = ops.take(self.row, ops.cast(inputs, "int32"), axis=0)
        return ops.take(change, rows, axis=0)

    def kernel_delta(self, kernel):
        convert = ops.convert_to_numpy
        delta = np.zeros_like(kernel)
        delta[self.token_ids] = convert(self.token_change)
        return delta * convert(self.strength)
