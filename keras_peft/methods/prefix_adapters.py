"""Adapters that put learned keys and values in front of an attention's."""

import inspect
import math

from keras import ops

from keras_peft.methods.token_adapters import TokenAdapter


class PrefixAdapter(TokenAdapter):
    """At a layer that takes a prefix.

    The first of a model holds the weights of all. The others read them by its
    method, which nothing tracks, so that each weight is kept once.
    """

    def take_from(self, owner, index, part):
        """Says whose weights, of which attention, and keys or values."""
        self.read = owner.prefixes
        self.index, self.part = index, part

    def initialize(self, rng):
        for key, variable in self.parameters.items():
            scale = 0.02 if key == "prefix" else 1.0
            if key.endswith("_kernel"):
                scale = 1 / math.sqrt(variable.shape[0])
            if not key.endswith("_bias"):
                value = rng.normal(scale=scale, size=variable.shape)
                variable.assign(value.astype("float32"))

    def prefixes(self, *index):
        """Keys and values, `(num_tokens, layers, 2, heads, head_dim)`.

        With `index`, those of one layer, or one part of them.
        """
        if "prefix" in self.kept:
            return self.prefix[(slice(None), *index)]
        hidden = ops.matmul(self.prefix_inputs, self.dense_0_kernel)
        hidden = ops.tanh(hidden + self.dense_0_bias)
        # Of one layer only: the last kernel is the largest.
        kernel = self.dense_1_kernel[(slice(None), *index)]
        return ops.tensordot(hidden, kernel, 1) + self.dense_1_bias[index]

    def in_front_of(self, values, part, skip):
        """`values` `(batch, tokens, heads, size)` without the first `skip`.

        Before them come the prefix's.
        """
        rows = self.rows_like(values, part)
        return ops.concatenate([rows, values[:, skip:]], axis=1)

    def rows_like(self, values, part):
        """The prefix for `values` of shape `(batch, tokens, heads, size)`.

        Where their heads repeat, so do those of the prefix.
        """
        rows = self.read(self.index, part)
        rows = ops.repeat(rows, values.shape[2] // rows.shape[1], axis=1)
        return ops.zeros_like(values[:, :1]) + ops.cast(rows, values.dtype)

    def all_seen(self, mask):
        """Ones of `mask` `(..., keys)` for the keys of the prefix."""
        seen = ops.ones_like(mask[..., :1])
        return ops.repeat(seen, self.tokens.num_tokens, axis=-1)

    def around(self, call, *args, **kwargs):
        return call(*args, **kwargs)


class ProjectionAdapter(PrefixAdapter):
    """At a key or value projection of a decoder."""

    def around(self, call, *args, **kwargs):
        outputs = call(*args, **kwargs)
        # One token alone is a later step of `generate()`: the prefix is in
        # the cache. Told by the length, which a layer that is computed again
        # in the backward pass has too.
        if not self.present or outputs.shape[1] == 1:
            return outputs
        return self.in_front_of(outputs, self.part, self.tokens.num_tokens)


class PrefixedAttention:
    """Mixed into an attention: its keys and values begin with the prefix."""

    def _compute_attention(self, *args, **kwargs):
        attend = super()._compute_attention
        for adapter in self.adapters.values():
            if isinstance(adapter, AttentionAdapter) and adapter.present:
                bound = inspect.signature(attend).bind(*args, **kwargs)
                adapter.change(bound.arguments)
                return attend(*bound.args, **bound.kwargs)
        return attend(*args, **kwargs)


class AttentionAdapter(PrefixAdapter):
    """At an attention: the prefix makes its keys and values longer."""

    mixin = PrefixedAttention

    def change(self, arguments, skip=0):
        """Changes the `arguments` of `_compute_attention`, by name."""
        _, key, value, *_ = arguments
        arguments[key] = self.in_front_of(arguments[key], 0, skip)
        arguments[value] = self.in_front_of(arguments[value], 1, skip)
        mask = arguments.get("attention_mask")
        if mask is not None and not skip:
            mask = ops.concatenate([self.all_seen(mask), mask], axis=-1)
            arguments["attention_mask"] = mask


class CausalAttentionAdapter(AttentionAdapter):
    """At an attention of a decoder, where virtual tokens hold the place."""

    def change(self, arguments):
        super().change(arguments, skip=self.tokens.num_tokens)


class UnbiasedPrefix:
    """Mixed into an attention of T5: no position moves the prefix's scores."""

    def compute_bias(self, query_length, key_length, *args, **kwargs):
        bias = super().compute_bias
        for adapter in self.adapters.values():
            if isinstance(adapter, BiasedAttentionAdapter) and adapter.present:
                count = adapter.tokens.num_tokens
                bias = bias(query_length, key_length - count, *args, **kwargs)
                none = ops.repeat(ops.zeros_like(bias[..., :1]), count, axis=-1)
                return ops.concatenate([bias, none], axis=-1)
        return bias(query_length, key_length, *args, **kwargs)


class BiasedAttentionAdapter(PrefixAdapter):
    """At an attention of T5, whose scores have a bias of relative positions.

    Its keys and values are those of a cache, where the prefix lies behind the
    text: no position moves, and the order of keys means nothing to a softmax.
    """

    mixin = UnbiasedPrefix

    def __init__(self, layer, shapes, name, tokens):
        def project(inputs):
            split = (ops.shape(inputs)[0], -1)
            split = (*split, layer.num_heads, layer.key_value_dim)
            kinds = (layer.key_projector, layer.value_projector)
            return [ops.reshape(kind(inputs), split) for kind in kinds]

        self.project = project
        super().__init__(layer, shapes, name, tokens)

    def around(self, call, inputs, mask=None, cache=None, **kwargs):
        if not self.present:
            return call(inputs, mask=mask, cache=cache, **kwargs)
        if mask is not None:
            mask = ops.concatenate([mask, self.all_seen(mask)], axis=-1)
        if cache is None:
            parts = self.project(inputs)
        else:
            parts = [cache[:, 0], cache[:, 1]]
        parts = [
            ops.concatenate([values, self.rows_like(values, part)], axis=1)
            for part, values in enumerate(parts)
        ]
        longer = ops.stack(parts, axis=1)
        *found, longer = call(inputs, mask=mask, cache=longer, **kwargs)
        if cache is not None:
            cache = longer[:, :, : -self.tokens.num_tokens]
        return *found, cache


class PositionAdapter(TokenAdapter):
    """At learned positions beside prefixes: the text's begin after them."""

    def around(self, call, inputs, start_index=0, **kwargs):
        if self.present:
            self.tokens.check_length(inputs.shape[-2])
            start_index = start_index + self.tokens.num_tokens
        return call(inputs, start_index=start_index, **kwargs)
