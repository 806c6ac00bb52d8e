"""ReFT: low-rank edits of hidden states at a few positions."""

import inspect

import keras
import numpy as np
from keras import ops

from keras_peft import layer_tree
from keras_peft.blocks import block_of
from keras_peft.methods.block_outputs import BlockAdapter
from keras_peft.methods.block_outputs import OfBlocks
from keras_peft.methods.method import Method
from keras_peft.methods.settings import check_positive_integer

_VARIANTS = ("loreft", "direft")


@keras.saving.register_keras_serializable(package="keras_peft")
class ReFT(OfBlocks, Method):
    """Representation fine-tuning: low-rank edits of what blocks return.

    At the first `prefix_positions` and the last `suffix_positions` tokens of
    each row, padding not counted, the outputs `h` of each transformer block
    become

    - `"loreft"`: `h + R.T @ (W @ h + b - R @ h)`, where the rows of `R` are
      orthonormal: the hidden state is replaced within a subspace of `rank`
      dimensions. `W` starts as `R`, so that an adapted model starts as its
      base, up to rounding.
    - `"direft"`: `h + R.T @ (W @ h + b)`, with any `R`. `W` starts at zero, so
      that an adapted model starts as its base.

    `R` and `W` are `(rank, hidden size)`, `b` is `(rank,)`, and positions at
    both ends share them. Trainable parameters per block:
    `2 * rank * d + rank`. It cannot be merged.

    In `generate()` positions count from the beginning of the prompt. Last
    positions would move with every token there, so a model with
    `suffix_positions` classifies, and does not generate.

    - [Wu et al., 2024](https://arxiv.org/abs/2404.03592)

    Args:
        rank: Positive integer. Dimensions of the subspace; 1 to 8 is usual.
        prefix_positions: How many tokens are edited from the beginning.
        suffix_positions: How many from the end.
        variant: `"loreft"` or `"direft"`.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
    >>> keras_peft.adapt(model, keras_peft.ReFT(rank=4, prefix_positions=5))
    """

    def __init__(
        self,
        rank=4,
        prefix_positions=3,
        suffix_positions=0,
        variant="loreft",
    ):
        check_positive_integer("rank", rank, "1 to 8")
        counts = (prefix_positions, suffix_positions)
        whole = all(type(n) is int and n >= 0 for n in counts)
        if not whole or not any(counts):
            raise ValueError(
                "`prefix_positions` and `suffix_positions` must be integers "
                "of at least 0, and not both 0. Received: "
                f"prefix_positions={prefix_positions!r}, "
                f"suffix_positions={suffix_positions!r}"
            )
        if variant not in _VARIANTS:
            raise ValueError(
                f"`variant` must be one of {', '.join(map(repr, _VARIANTS))}. "
                f"Received: variant={variant!r}"
            )
        self.rank = rank
        self.prefix_positions = prefix_positions
        self.suffix_positions = suffix_positions
        self.variant = variant

    def objection(self, path, layer):
        width = block_of(layer).hidden
        if self.rank > width:
            return f"rank {self.rank} is larger than its hidden size of {width}"
        return None

    def shapes(self, path, layer):
        width = block_of(layer).hidden
        return {
            "reft_projection": (self.rank, width),
            "reft_source": (self.rank, width),
            "reft_bias": (self.rank,),
        }

    def create(self, path, layer, name):
        return ReFTLayer(self, layer, self.shapes(path, layer), name)


class ReFTLayer(BlockAdapter):
    """The edit of one block's outputs."""

    counts_positions = True

    def __init__(self, method, layer, shapes, name):
        self.prefix = method.prefix_positions
        self.suffix = method.suffix_positions
        self.replaces = method.variant == "loreft"
        signature = inspect.signature(layer_tree.base_class(layer).call)
        object.__setattr__(self, "signature", signature)
        super().__init__(layer, shapes, name)

    def build_weights(self, shapes):
        for key, shape in shapes.items():
            # In half precision the rows would not be orthonormal, nor the
            # difference of two almost equal matrices be right.
            setattr(self, key, self.weight(key, shape, autocast=False))

    def initialize(self, rng):
        width, rank = self.reft_projection.shape[::-1]
        basis, _ = np.linalg.qr(rng.normal(size=(width, rank)))
        self.reft_projection.assign(basis.T.astype("float32"))
        if self.replaces:
            self.reft_source.assign(self.projection())

    def projection(self):
        """`R`, of shape `(rank, hidden size)`."""
        rows = ops.convert_to_tensor(self.reft_projection)
        return orthonormal(rows) if self.replaces else rows

    def change(self, hidden, args, kwargs):
        dtype = hidden.dtype
        projection, source = self.projection(), self.reft_source
        if self.replaces:
            source = source - projection
        where = self.edited(hidden, args, kwargs)
        factor = ops.cast(where, dtype) * ops.cast(self.strength, dtype)
        edit = ops.matmul(hidden, ops.cast(ops.transpose(source), dtype))
        edit = edit + ops.cast(self.reft_bias, dtype)
        return ops.matmul(edit, ops.cast(projection, dtype)) * factor

    def edited(self, hidden, args, kwargs):
        """Where tokens are edited: `(batch or 1, tokens, 1)`."""
        found = self.signature.bind_partial(None, *args, **kwargs).arguments
        found |= found.pop("kwargs", {})
        cached = _given(found, "cache") is not None
        if cached and self.suffix:
            raise ValueError(
                "The last positions of a text that is being generated move "
                "with every token. Adapt with `suffix_positions=0` to "
                f"generate. Received: suffix_positions={self.suffix}"
            )
        mask = None if cached else _mask_of(found, required=self.suffix > 0)
        if mask is not None:
            mask = ops.cast(mask, "int32")
            token = ops.cumsum(mask, axis=1) - 1
            length = token[:, -1:] + 1
        else:
            length = ops.shape(hidden)[1]
            token = ops.expand_dims(ops.arange(length, dtype="int32"), 0)
            begin = _given(found, "cache_update_index") if cached else None
            token = token if begin is None else token + begin
        chosen = token < self.prefix
        if self.suffix:
            last = token >= length - self.suffix
            chosen = ops.logical_or(chosen, last)
        if mask is not None:
            chosen = ops.logical_and(chosen, mask > 0)
        return ops.expand_dims(chosen, -1)


def orthonormal(matrix):
    """Rows made orthonormal from the first on: the Gram-Schmidt process.

    The QR decomposition would do it too, but is no operator of ONNX.
    """
    rows = []
    for index in range(matrix.shape[0]):
        row = matrix[index : index + 1]
        if rows:
            basis = ops.concatenate(rows, axis=0)
            along = ops.matmul(row, ops.transpose(basis))
            row = row - ops.matmul(along, basis)
        rows.append(row / ops.sqrt(ops.sum(ops.square(row))))
    return ops.concatenate(rows, axis=0)


def _given(found, ending):
    """The block's own argument with that ending of its name, or `None`."""
    names = [
        name
        for name in found
        if name.endswith(ending) and not name.startswith(("cross", "encoder"))
    ]
    return next((found[n] for n in names if found[n] is not None), None)


def _mask_of(found, required):
    """Which tokens are no padding, `(batch, tokens)`, or `None` for all."""
    mask = _given(found, "padding_mask")
    if mask is None:
        hidden = list(found.values())[1]  # After `self`.
        mask = getattr(hidden, "_keras_mask", None)
    if mask is None:
        mask = _given(found, "attention_mask")
    if mask is None and _given(found, "mask_content") is None:
        return None
    shape = () if mask is None else mask.shape
    if len(shape) == 3 and shape[1] == 1:
        return mask[:, 0]
    if len(shape) == 2:
        return mask
    if required:
        raise ValueError(
            "The block says in its attention mask alone which tokens are "
            "padding, so the last tokens of a row cannot be found. Use "
            f"`suffix_positions=0`. Received: a mask of shape {shape}"
        )
    return None
