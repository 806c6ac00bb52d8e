"""Inputs to trace and to check a model with: made up, or the user's own."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_peft.export import media
from keras_peft.export.signature import ModelInput
from keras_peft.export.signature import Signature
from keras_peft.export.signature import longest_sequence
from keras_peft.export.signature import tensor_names

Batch = dict[str, np.ndarray]


def trace_sizes(model: keras.Model, signature: Signature) -> dict[str, int]:
    """Sizes of the free axes while tracing.

    All differ, and none is 1, so that a tracer cannot take two axes for one
    or a free axis for a constant.
    """
    return _sizes(model, signature, batch=2, length=11, image=64)


def check_sizes(
    model: keras.Model, signature: Signature
) -> tuple[dict[str, int], ...]:
    """Two other sets of sizes than the traced one: larger and smaller."""
    return (
        _sizes(model, signature, batch=3, length=19, image=96),
        _sizes(model, signature, batch=1, length=6, image=160),
    )


def typical_sizes(model: keras.Model, signature: Signature) -> dict[str, int]:
    """Sizes as in use: a few rows of some length."""
    return _sizes(model, signature, batch=4, length=64, image=128)


def _sizes(
    model: keras.Model,
    signature: Signature,
    batch: int,
    length: int,
    image: int,
) -> dict[str, int]:
    longest = longest_sequence(model)
    framed = _framed_axes(signature)
    lengths, images = 0, 0
    sizes = {}
    for axis in signature.axes:
        if axis == "batch":
            sizes[axis] = batch
        elif axis.endswith(("height", "width")):
            # Vision models halve the image up to five times.
            sizes[axis] = image + 32 * images
            images += 1
        else:
            sizes[axis] = min(length + 2 * lengths, longest)
            if axis in framed:
                sizes[axis] = _steps(model, sizes[axis], longest)
            lengths += 1
    # As many as no other axis has, and never one.
    return media.settle(model, signature, sizes, images=batch + 1)


def _framed_axes(signature: Signature) -> set[int | str]:
    """Free lengths of sound and of other sequences of vectors."""
    return {
        i.shape[1]
        for i in signature.inputs
        if len(i.shape) == 3 and i.dtype.startswith(("float", "bfloat"))
    }


def _steps(model: keras.Model, frames: int, longest: int) -> int:
    """Length of a sequence that convolutions cut down to so many frames.

    Padding, as Whisper's, may give one more, so no more steps are made than
    `longest` strides: padded or not, that is no more than `longest` frames.
    """
    shrinking = [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.Conv1D) and layer.padding == "valid"
    ]
    for layer in reversed(shrinking):
        reach = layer.dilation_rate[0] * (layer.kernel_size[0] - 1) + 1
        frames = (frames - 1) * layer.strides[0] + reach
        longest = longest * layer.strides[0]
    return min(frames, longest)


def make_batch(
    model: keras.Model,
    signature: Signature,
    sizes: Mapping[str, int],
    seed: int,
) -> Batch:
    """Random inputs that the model accepts.

    Token ids stay within the table they are looked up in, masks end in
    padding on every row but the first, and floats are normal.
    """
    rng = np.random.default_rng(seed)
    return {
        i.name: _make(model, i, sizes, rng).astype(i.dtype)
        for i in signature.inputs
    }


def _make(
    model: keras.Model,
    spec: ModelInput,
    sizes: Mapping[str, int],
    rng: np.random.Generator,
) -> np.ndarray:
    shape = spec.sized(sizes)
    if spec.name == "boxes" and shape[2:] == (5,):
        return _boxes(shape, rng)
    if spec.dtype.startswith(("float", "bfloat")):
        return rng.normal(size=shape)
    placed = media.make(spec, sizes)
    if placed is not None:
        return placed
    if "mask" in spec.name and "position" not in spec.name:
        return _ragged(shape)
    if len(shape) < 2:  # Numbers of steps, not tokens.
        return rng.integers(2, 5, shape)
    if spec.name == "position_ids":
        return np.broadcast_to(np.arange(shape[1]), shape)
    if "position" in spec.name:
        return rng.integers(0, min(sizes.values()), shape)
    return rng.integers(0, _vocabulary(model, spec.name), shape)


def _boxes(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Prompts of SAM 3: which image of the batch, center, width, height."""
    boxes = rng.uniform(0.2, 0.7, shape)
    boxes[..., 0] = np.arange(shape[0])[:, None]
    return boxes


def _ragged(shape: tuple[int, ...]) -> np.ndarray:
    mask = np.ones(shape)
    for row in range(1, shape[0]):
        mask[row, ..., max(1, shape[-1] - 2 * row) :] = 0
    return mask


def _vocabulary(model: keras.Model, name: str) -> int:
    """Rows of the table that the input is looked up in."""
    consumers = _consumers(model, name)
    for consumer in consumers:
        if isinstance(consumer, keras.Model) and _consumers(consumer, name):
            return _vocabulary(consumer, name)
    rows = [
        layer.input_dim
        for consumer in consumers
        for layer in [consumer, *_sublayers(consumer)]
        if isinstance(getattr(layer, "input_dim", None), int)
        and "position" not in layer.name
    ]
    if rows:
        return max(rows)
    anywhere = [
        layer.input_dim
        for layer in model._flatten_layers()
        if isinstance(getattr(layer, "input_dim", None), int)
    ]
    return min(anywhere, default=2)


def _consumers(model: keras.Model, name: str) -> list[Any]:
    """Operations of a functional model that read the input directly."""
    struct = getattr(model, "_inputs_struct", None)
    tensors = [] if struct is None else keras.tree.flatten(struct)
    named = dict(zip(tensor_names(tensors), tensors, strict=True))
    if name not in named:
        return []
    return [
        operation
        for operation in model.operations
        for node in operation._inbound_nodes
        if any(tensor is named[name] for tensor in node.input_tensors)
    ]


def _sublayers(operation: Any) -> list[keras.layers.Layer]:
    if not isinstance(operation, keras.layers.Layer):
        return []
    return list(operation._flatten_layers(include_self=False))


def read_batches(signature: Signature, calibration: Any) -> list[Batch]:
    """The user's batches, by input name and in the model's types.

    Args:
        signature: Inputs of the model.
        calibration: One batch, or a list or tuple of batches: an array for a
            model with one input, or a dictionary of arrays by input name.

    Raises:
        ValueError: If names or shapes are not the model's; all are listed.
    """
    several = isinstance(calibration, list | tuple)
    batches = list(calibration) if several else [calibration]
    if not batches:
        raise ValueError(
            "`calibration` holds no batch. Pass at least one, or `None` to "
            f"check with made-up inputs. Received: calibration={calibration!r}"
        )
    return [_read_batch(signature, batch) for batch in batches]


def _read_batch(signature: Signature, batch: Any) -> Batch:
    names = [i.name for i in signature.inputs]
    if not isinstance(batch, Mapping):
        if len(names) != 1:
            raise ValueError(
                "A batch for a model with several inputs is a dictionary of "
                f"arrays named {names}. "
                f"Received: a batch of type {type(batch).__name__}"
            )
        batch = {names[0]: batch}
    if set(batch) != set(names):
        raise ValueError(
            f"A batch names every input of the model once: {sorted(names)}. "
            f"Received: a batch with {sorted(batch)}"
        )
    arrays = {
        i.name: keras.ops.convert_to_numpy(batch[i.name]).astype(i.dtype)
        for i in signature.inputs
    }
    _check_shapes(signature, arrays)
    return arrays


def _check_shapes(signature: Signature, arrays: Batch) -> None:
    sizes: dict[str, int] = {}
    wrong = []
    for spec in signature.inputs:
        shape = arrays[spec.name].shape
        fits = len(shape) == len(spec.shape) and all(
            size == sizes.setdefault(wanted, size)
            if isinstance(wanted, str)
            else size == wanted
            for size, wanted in zip(shape, spec.shape, strict=True)
        )
        if not fits:
            wrong.append(f"{spec.name}: {shape} where {spec.shape} fits")
    if wrong:
        raise ValueError(
            "Shapes of a batch must fit the model's inputs, and axes of one "
            f"name have one size. Received: {'; '.join(wrong)}"
        )
