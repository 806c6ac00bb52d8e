"""Sequences of one row that see nothing of each other."""

import dataclasses
import functools
import inspect

import keras
import numpy as np
from keras import ops

from keras_peft import layer_tree
from keras_peft.methods.virtual_tokens import has_positions
from keras_peft.patterns import lies_in
from keras_peft.training.model_blocks import layers_and_blocks

# What blocks of keras-hub call the method that says which token sees which.
_MASKS = ("_compute_self_attention_mask", "_compute_attention_mask")
_INPUTS = {"token_ids", "padding_mask"}


def separate_segments(model: keras.Model) -> keras.Model:
    """Keeps the sequences of a packed row apart, in place.

    Wherever a `padding_mask` numbers the sequences of a row, 1, 2, ..., with 0
    for padding, as that of `keras_peft.training.pack` does, a token sees those
    of its own number alone, and learned positions begin anew with each number.
    Every token's output is what it is for its sequence alone in a row, up to
    rounding, in training, `evaluate` and `predict`:

        model(row)[t] = model(sequence of t)[place of t in it]

    A mask of ones and zeros gives the outputs that it gave before. Parts that
    look at relative positions, such as rotary embeddings and ALiBi, need
    nothing. What is saved knows nothing of it, and
    `keras_peft.training.restore` undoes it.

    Whether a model keeps its sequences apart is tried on a short row before
    it is changed.

    - [Krell et al., 2021](https://arxiv.org/abs/2107.02027)

    Args:
        model: A causal language model of keras-hub, or another model around
            its backbone. Adapted or not, but not by a method that counts the
            positions of a row: prompts, prefixes and ReFT.

    Returns:
        `model`.

    Raises:
        ValueError: if the backbone is no decoder of texts alone, or something
            in it passes from one sequence to the next. The model is then as
            it was.

    Example:
    >>> keras_peft.training.separate_segments(causal_lm)
    >>> x, y, sample_weight = keras_peft.training.pack(sequences, length=1024)
    >>> causal_lm.fit(x, y, sample_weight=sample_weight, batch_size=8)
    """
    replace_methods(separable_parts(model))
    layer_tree.forget_compiled(model, optimizer=False)
    return model


@dataclasses.dataclass(frozen=True)
class SeparableParts:
    """Where the tokens of a row meet.

    Attributes:
        backbone: Is called with the padding mask.
        blocks: Say which token sees which.
        positions: Learned embeddings of positions.
    """

    backbone: keras.Model
    blocks: list[keras.Layer]
    positions: list[keras.Layer]


def separable_parts(model: keras.Model) -> SeparableParts:
    """The parts of `model`, if those are all in which tokens meet."""
    layers, blocks = layers_and_blocks(model)
    backbone = _backbone_around(layers, [block.path for block in blocks])
    parts = SeparableParts(
        backbone,
        [layers[block.path] for block in blocks],
        [la for _, la in layer_tree.walk(backbone) if has_positions(la)],
    )
    _check_methods(parts)
    with layer_tree.replacing_for_now(
        [backbone, *parts.blocks, *parts.positions]
    ):
        replace_methods(parts)
        _check_apart(backbone)
    return parts


def replace_methods(parts: SeparableParts) -> None:
    """Lets parts heed segments."""
    why = "sequences of a row kept apart"
    layer_tree.replace_method(parts.backbone, "call", _call, why)
    for block in parts.blocks:
        name = _mask_method(block)
        layer_tree.replace_method(block, name, functools.partial(_mask, name))
    for layer in parts.positions:
        layer_tree.replace_method(layer, "call", _embed_positions)


# -- What is put in place of methods -----------------------------------------


def _call(backbone, inputs, *args, **kwargs):
    """The backbone's call, with ones for all tokens in its padding mask."""
    _check_adapters(backbone)
    numbers = ops.cast(inputs["padding_mask"], "int32")
    inputs = {**inputs, "padding_mask": ops.cast(numbers > 0, "int32")}
    with layer_tree.calling_with_segments(numbers):
        call = layer_tree.method_of_class(backbone, "call")
        return call(inputs, *args, **kwargs)


def _mask(name, block, *args, **kwargs):
    """A block's mask `(batch, queries, keys)`, within segments."""
    mask = layer_tree.method_of_class(block, name)(*args, **kwargs)
    numbers = layer_tree.segments()
    if numbers is None:
        return mask
    _check_adapters(block)
    queries = numbers[:, :, None]
    # Padding sees what it saw: a query without any key has no softmax.
    own = ops.logical_or(_same(numbers), queries == 0)
    dtype = keras.backend.standardize_dtype(mask.dtype)
    return ops.cast(ops.logical_and(mask, own), dtype)


def _embed_positions(layer, inputs, *args, **kwargs):
    numbers = layer_tree.segments()
    if numbers is not None:
        kwargs = {**kwargs, "positions": _positions(numbers)}
    call = layer_tree.method_of_class(layer, "call")
    return call(inputs, *args, **kwargs)


def _positions(numbers):
    """Places of tokens in their segments, `(batch, tokens)`.

    Up to the end of the first segment they are those in the row, whatever
    padding stands before it: so they were.
    """
    length = ops.shape(numbers)[1]
    places = ops.arange(length, dtype="int32")
    first = ops.min(ops.where(_same(numbers), places, length), axis=-1)
    return ops.where(numbers > 1, places - first, places)


def _same(numbers):
    return numbers[:, :, None] == numbers[:, None, :]


# -- What cannot be served ---------------------------------------------------


def _backbone_around(layers, blocks):
    """The innermost model that holds all blocks."""
    around = [
        path
        for path, layer in layers.items()
        if isinstance(layer, keras.Model)
        and all(path == "" or lies_in(block, [path]) for block in blocks)
    ]
    path = max(around, key=len)
    backbone = layers[path]
    inputs = backbone.input if getattr(backbone, "inputs", None) else None
    names = inputs.keys() if isinstance(inputs, dict) else ()
    if path == "" or _INPUTS != set(names):
        raise ValueError(
            "Rows are packed for a model with a backbone among its layers "
            "that takes a dict of `token_ids` and `padding_mask` and no more, "
            "such as a causal language model of keras-hub. Train this one on "
            "one sequence per row, with `keras_peft.training.LengthBuckets`. "
            f"Received: model={layers[''].name!r}, in which "
            f"{backbone.name!r} takes {sorted(names)}"
        )
    return backbone


def _mask_method(block):
    """The method that says which token of a block sees which, or `None`."""
    call = getattr(layer_tree.base_class(block).call, "__code__", None)
    called = () if call is None else call.co_names
    return next((name for name in _MASKS if name in called), None)


def _check_methods(parts):
    def takes_positions(layer):
        call = layer_tree.base_class(layer).call
        return "positions" in inspect.signature(call).parameters

    wrong = [block for block in parts.blocks if _mask_method(block) is None]
    wrong += [la for la in parts.positions if not takes_positions(la)]
    if wrong:
        raise ValueError(
            "The sequences of a row can be kept apart where each block says "
            "by a method which token sees which, as decoders of keras-hub do, "
            "and embeddings of positions can be told them. Train this model "
            "on one sequence per row, with "
            "`keras_peft.training.LengthBuckets`. Received: layers "
            f"{sorted({layer_tree.base_class(la).__name__ for la in wrong})}"
        )


def _check_adapters(layer):
    counting = [
        name
        for name, adapter in getattr(layer, "adapters", {}).items()
        if adapter.counts_positions
    ]
    if counting:
        raise ValueError(
            "Adapters that count the positions of a row act on its first "
            "sequence and not on the others. Train them on one sequence per "
            "row, after `keras_peft.training.restore(model)`, or choose a "
            "method that changes layers, such as LoRA. "
            f"Received: adapters {counting} at {layer.name!r}"
        )


# How far two ways to compute the same may be apart, as a share of its size:
# about the square root of one rounding.
_ROUNDING = {"float64": 2.0**-26, "float16": 2.0**-5, "bfloat16": 2.0**-4}


def _check_apart(backbone):
    """Computes the same three tokens behind three others, and alone."""
    tokens = np.array([[1, 2, 3, 4, 5, 6], [4, 5, 6, 0, 0, 0]], "int32")
    numbers = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 0, 0, 0]], "int32")
    inputs = {"token_ids": tokens, "padding_mask": numbers}
    outputs = ops.cast(backbone(inputs, training=False), "float32")
    packed, alone = ops.convert_to_numpy(outputs)
    change = np.linalg.norm(packed[3:] - alone[:3])
    share = change / np.linalg.norm(alone[:3])
    # A share that is no number is no small one.
    if not share <= _ROUNDING.get(backbone.compute_dtype, 2.0**-11):
        raise ValueError(
            "The sequences of a row do not stay apart in this model: the "
            "second of two comes out otherwise than alone. Something beside "
            "attention passes from token to token, such as a recurrence or a "
            "convolution, or counts the positions of the row. Train it on one "
            "sequence per row, with `keras_peft.training.LengthBuckets`. "
            f"Received: backbone {backbone.name!r}, whose outputs change by "
            f"{share:.2g} of their size"
        )
