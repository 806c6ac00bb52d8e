"""What goes into a model: names, types, shapes, and which axes are free."""

import dataclasses
import inspect
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras

# Text inputs of one call share their length, so their graphs share its name.
_TEXT_INPUTS = ("token_ids", "segment_ids", "padding_mask")


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
        if self.by_keyword:
            return model(**nest, training=False)
        return model(nest, training=False)

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
        signature = _from_build_shapes(model)
    else:
        signature = _from_keras_tensors(struct)
    return signature if _takes(model, signature) else _shared(signature)


def _takes(model: keras.Model, signature: Signature) -> bool:
    """Whether the free axes can really have different sizes."""
    lengths = [a for a in signature.axes if a.endswith("sequence")]
    if len(lengths) < 2:
        return True
    sizes = dict.fromkeys(signature.axes, 64)
    sizes |= {axis: 5 + number for number, axis in enumerate(lengths)}
    tensors = {
        i.name: keras.KerasTensor(i.sized(sizes), i.dtype)
        for i in signature.inputs
    }
    try:
        signature.call(model, tensors)
    except Exception:  # Whatever a backend raises for shapes that clash.
        return False
    return True


def _shared(signature: Signature) -> Signature:
    """One name, so one size, for the sequence axes of all inputs."""
    inputs = tuple(
        dataclasses.replace(
            i,
            shape=tuple(
                "sequence" if str(size).endswith("sequence") else size
                for size in i.shape
            ),
        )
        for i in signature.inputs
    )
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


def _from_build_shapes(model: keras.Model) -> Signature:
    """Reads a subclassed model's inputs from its first call.

    Its own record holds shapes only, so token inputs are told by the layer
    that looks them up: integers where the name says ids or mask.
    """
    recorded = getattr(model, "_build_shapes_dict", None)
    if not recorded:
        raise ValueError(
            "The inputs of a model are known after its first call only. Call "
            "it on a batch of data, or build it with "
            "`model.build(input_shape)`, then export. "
            f"Received: model={model.name!r}, which was never built"
        )
    by_keyword = len(recorded) > 1
    nest = {key.removesuffix("_shape"): s for key, s in recorded.items()}
    if not by_keyword:
        first = next(iter(inspect.signature(model.call).parameters))
        nest = {first: next(iter(recorded.values()))}
    named = list(_name_shapes(nest, ""))
    inputs = tuple(
        ModelInput(
            name,
            _guess_dtype(name, model),
            name_axes(name, (None, *shape[1:]), len(named) > 1),
        )
        for name, shape in named
    )
    structure = _names_in_place(nest, "")
    if not by_keyword:
        structure = next(iter(structure.values()))
    return Signature(inputs, structure, by_keyword)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        d is None or isinstance(d, int) for d in value
    )


def _name_shapes(nest: Any, name: str) -> Iterator[tuple[str, Any]]:
    if _is_shape(nest):
        yield name, tuple(nest)
        return
    for key, value in _items(nest):
        yield from _name_shapes(value, _child_name(nest, name, key))


def _names_in_place(nest: Any, name: str) -> Any:
    if _is_shape(nest):
        return name
    named = {
        key: _names_in_place(value, _child_name(nest, name, key))
        for key, value in _items(nest)
    }
    return named if isinstance(nest, dict) else list(named.values())


def _items(nest: Any) -> list[tuple[Any, Any]]:
    """Entries in the order `keras.tree.flatten` visits them."""
    return (
        sorted(nest.items()) if isinstance(nest, dict) else [*enumerate(nest)]
    )


def _child_name(nest: Any, name: str, key: Any) -> str:
    return key if isinstance(nest, dict) else f"{name}_{key}"


def _guess_dtype(name: str, model: keras.Model) -> str:
    token_like = name.endswith(("_ids", "_mask", "tokens"))
    return "int32" if token_like else str(model.input_dtype)


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
    free = ["sequence", "width"] if len(shape) < 4 else ["height", "width"]
    free += [f"axis_{axis}" for axis in range(3, len(shape))]
    return tuple(
        size
        if size is not None
        else "batch"
        if axis == 0
        else prefix + free[axis - 1]
        for axis, size in enumerate((None, *shape[1:]))
    )
