"""Adapters of what whole transformer blocks return."""

from keras_peft.blocks import block_of
from keras_peft.blocks import find_blocks
from keras_peft.blocks import require
from keras_peft.methods.adapter import CallAdapter


class OfBlocks:
    """Mixed into methods whose adapters sit on transformer blocks."""

    def accepts(self, layer):
        return block_of(layer) is not None

    def default_targets(self, candidates):
        return require(find_blocks(candidates.layers), "paths")


class BlockAdapter(CallAdapter):
    """Adds to the hidden states that a block returns."""

    def around(self, call, *args, **kwargs):
        outputs = call(*args, **kwargs)
        # With a cache, or scores, behind them.
        several = isinstance(outputs, (tuple, list))
        hidden, *rest = outputs if several else [outputs]
        hidden = hidden + self.change(hidden, args, kwargs)
        return type(outputs)((hidden, *rest)) if several else hidden

    def change(self, hidden, args, kwargs):
        """What is added to `hidden`, `(batch, tokens, hidden size)`.

        `args` and `kwargs` are those of the block's call.
        """
        raise NotImplementedError
