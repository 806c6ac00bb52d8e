"""What goes into a model: names, types, shapes, and which axes are free."""

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_peft.export import media
from keras_peft.export import subclassed
from keras_peft.export.adapters import taken_positions
from keras_peft.export.patches import schedule

# Text inputs of one call share their length, so their graphs share its name.
_TEXT_INPUTS = (
    "token_ids",
    "segment_ids",
    "position_ids",
    "padding_mask",
    "response_mask",
    "vision_mask",
)
# What layers call the number of places that they know.
_LENGTHS = ("sequence_length", "max_sequence_length", "max_label_length")
# What the inputs of segmentation models label.
_LABELS = {"labels": "points", "box_labels": "boxes"}


@dataclasses.dataclass(frozen=True)
class ModelInput:
    """One tensor of a model's input structure.

    Attributes:
        name: Name of the input.
        dtype: NumPy name of its element type.
        shape: A size per axis, or the name of a free axis.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def sized(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with numbers for the free axes."""
        return tuple(sizes[s] if isinstance(s, str) else s for s in self.shape)


@dataclasses.dataclass(frozen=True)
class Signature:
    """The inputs of a model and how its `call` takes them.

    Attributes:
        inputs: The tensors, in the order `keras.tree.flatten` gives them.
        structure: The nest of lists and dictionaries the model is called
            with, holding input names in place of tensors.
        by_keyword: Whether the outermost dictionary of `structure` is passed
            as keyword arguments.
    """

    inputs: tuple[ModelInput, ...]
    structure: Any
    by_keyword: bool = False

    def call(self, model: Any, tensors: dict[str, Any]) -> Any:
        """The outputs of `model` for tensors given by name."""
        nest = keras.tree.map_structure(tensors.__getitem__, self.structure)
        with schedule.patched():
            if self.by_keyword:
                return model(**nest, training=False)
            return model(nest, training=False)

    @property
    def names(self) -> list[str]:
        """Names of the inputs."""
        return [i.name for i in self.inputs]

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the free axes, without repetition."""
        names = (d for i in self.inputs for d in i.shape if isinstance(d, str))
        return tuple(dict.fromkeys(names))


def read_signature(model: keras.Model) -> Signature:
    """Finds the inputs of a built model.

    Raises:
        ValueError: If the model has never been built or called, so that
            nothing is known about its inputs.
    """
    struct = getattr(model, "_inputs_struct", None)
    if struct is None and isinstance(model, keras.Sequential) and model.built:
        struct = model.inputs[0]
    if struct is None:
        signature = _from_first_call(model)
    else:
        signature = _from_keras_tensors(struct)
    if not any(axis.endswith("sequence") for axis in signature.axes):
        return signature
    signature = _fix_mask_prompts(model, _label_prompts(signature))
    shared = _rename_sequences(signature, "sequence")
    fixed = _rename_sequences(signature, longest_sequence(model))
    for candidate in (signature, shared, fixed):
        if _takes(model, candidate):
            return candidate
    return signature


def longest_sequence(model: keras.Model) -> int:
    """The longest sequence every position table of the model can take."""
    taken = taken_positions(model)
    found = [
        getattr(layer, name, None)
        for layer in model._flatten_layers()
        for name in _LENGTHS
    ]
    lengths = [size for size in found if isinstance(size, int)]
    return min(lengths, default=512) - taken


def _takes(model: keras.Model, signature: Signature) -> bool:
    """Whether the free axes can really have different sizes."""
    sizes = dict.fromkeys(signature.axes, 64)
    lengths = [axis for axis in sizes if axis.endswith("sequence")]
    sizes["batch"] = 1
    sizes |= {axis: 5 + number for number, axis in enumerate(lengths)}
    sizes = media.settle(model, signature, sizes, images=2)
    tensors = {
        # Nothing is computed in zero steps, but a box may lie in image zero.
        i.name: np.full(i.sized(sizes), 0 if "float" in i.dtype else 1, i.dtype)
        for i in signature.inputs
    }
    try:
        signature.call(model, tensors)
    except Exception:  # Whatever a backend raises for shapes that clash.
        return False
    return True


def _label_prompts(signature: Signature) -> Signature:
    """Each prompt has a label: `box_labels` are as many as `boxes`."""
    lengths = {i.name: i.shape[1] for i in signature.inputs if len(i.shape) > 1}

    def labelled(spec: ModelInput) -> ModelInput:
        of = _LABELS.get(spec.name)
        if of not in lengths or len(spec.shape) != 2:
            return spec
        return dataclasses.replace(spec, shape=("batch", lengths[of]))

    inputs = tuple(map(labelled, signature.inputs))
    return dataclasses.replace(signature, inputs=inputs)


def _fix_mask_prompts(model: keras.Model, signature: Signature) -> Signature:
    """Segment Anything takes one mask per image, of one size."""
    sizes = [
        layer.image_embedding_size
        for layer in model._flatten_layers()
        if hasattr(layer, "image_embedding_size")
    ]

    def fixed(spec: ModelInput) -> ModelInput:
        if not sizes or spec.name != "masks":
            return spec
        height, width = sizes[0]
        shape = "batch", 1, 4 * height, 4 * width, 1
        return dataclasses.replace(spec, shape=shape)

    inputs = tuple(map(fixed, signature.inputs))
    return dataclasses.replace(signature, inputs=inputs)


def _rename_sequences(signature: Signature, size: int | str) -> Signature:
    """One name, so one size, for the sequence axes of all inputs."""
    inputs = tuple(
        dataclasses.replace(
            i,
            shape=tuple(
                size if str(old).endswith("sequence") else old
                for old in i.shape
            ),
        )
        for i in signature.inputs
    )
    return dataclasses.replace(signature, inputs=inputs)


def fix_constant_axes(
    signature: Signature, batches: Sequence[Mapping[str, np.ndarray]]
) -> Signature:
    """Frees only the axes, besides the batch, that differ between batches."""

    def fixed(spec: ModelInput) -> ModelInput:
        shapes = [batch[spec.name].shape for batch in batches]
        sizes = zip(spec.shape, *shapes, strict=True)
        shape = tuple(
            name if name == "batch" or len(set(seen)) > 1 else seen[0]
            for name, *seen in sizes
        )
        return dataclasses.replace(spec, shape=shape)

    inputs = tuple(map(fixed, signature.inputs))
    return dataclasses.replace(signature, inputs=inputs)


def _from_keras_tensors(struct: Any) -> Signature:
    tensors = keras.tree.flatten(struct)
    names = tensor_names(tensors)
    inputs = tuple(
        ModelInput(name, str(t.dtype), name_axes(name, t.shape, len(names) > 1))
        for name, t in zip(names, tensors, strict=True)
    )
    return Signature(inputs, keras.tree.pack_sequence_as(struct, names))


def tensor_names(tensors: Sequence[keras.KerasTensor]) -> list[str]:
    """Names a user gave, and `input` where Keras counted a tensor."""
    if len(tensors) == 1 and tensors[0].name.startswith("keras_tensor"):
        return ["input"]
    return [
        f"input_{n}" if t.name.startswith("keras_tensor") else t.name
        for n, t in enumerate(tensors)
    ]


def _from_first_call(model: keras.Model) -> Signature:
    named, structure, by_keyword = subclassed.recorded_inputs(model)
    inputs = tuple(
        ModelInput(
            name,
            subclassed.guess_dtype(name, model),
            name_axes(name, shape, len(named) > 1),
        )
        for name, shape in named
    )
    return Signature(inputs, structure, by_keyword)


def name_axes(
    name: str, shape: tuple[int | None, ...], several: bool
) -> tuple[int | str, ...]:
    """Names the free axes of an input.

    Two axes get one name only where every call must give them one size:
    the runtime may reuse buffers of axes that share a name.
    """
    prefix = ""
    for side in ("encoder_", "decoder_"):
        if name.startswith(side):
            prefix = side
    shared = name.removeprefix(prefix) in _TEXT_INPUTS
    if not prefix and several and not shared:
        prefix = f"{name}_"
    is_image = len(shape) == 4 and shape[1] is shape[2] is None
    free = ["height", "width"] if is_image else ["sequence", "height", "width"]
    free += [f"axis_{axis}" for axis in range(len(free) + 1, len(shape))]
    return tuple(
        size
        if size is not None
        else "batch"
        if axis == 0
        else prefix + free[axis - 1]
        for axis, size in enumerate((None, *shape[1:]))
    )
