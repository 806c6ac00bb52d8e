"""The inputs of a subclassed model, as its first call left them."""

import inspect
from collections.abc import Iterator
from typing import Any

import keras

Shape = tuple[int | None, ...]


def recorded_inputs(
    model: keras.Model,
) -> tuple[list[tuple[str, Shape]], Any, bool]:
    """Names and shapes of the inputs, with a free batch axis.

    Returns:
        The inputs in the order `keras.tree.flatten` visits them, the nest
        `call` takes with names in place of tensors, and whether its
        outermost dictionary holds keyword arguments.

    Raises:
        ValueError: If the model was never called.
    """
    recorded = getattr(model, "_build_shapes_dict", None)
    if not recorded:
        raise ValueError(
            "The inputs of a model are known after its first call only. Call "
            "it on a batch of data, or build it with "
            "`model.build(input_shape)`, then export. "
            f"Received: model={model.name!r}, which was never built"
        )
    nest = {key.removesuffix("_shape"): s for key, s in recorded.items()}
    by_keyword = len(nest) > 1
    if not by_keyword:
        first = next(iter(inspect.signature(model.call).parameters))
        nest = {first: next(iter(nest.values()))}
    named = [(name, (None, *s[1:])) for name, s in _name_shapes(nest, "")]
    structure = _names_in_place(nest, "")
    if not by_keyword:
        structure = next(iter(structure.values()))
    return named, structure, by_keyword


def guess_dtype(name: str, model: keras.Model) -> str:
    """Keras records shapes only: integers where a name says ids or mask."""
    token_like = name.endswith(("_ids", "_mask", "tokens"))
    return "int32" if token_like else str(model.input_dtype)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        d is None or isinstance(d, int) for d in value
    )


def _name_shapes(nest: Any, name: str) -> Iterator[tuple[str, Shape]]:
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
    return (
        sorted(nest.items()) if isinstance(nest, dict) else [*enumerate(nest)]
    )


def _child_name(nest: Any, name: str, key: Any) -> str:
    return key if isinstance(nest, dict) else f"{name}_{key}"
