"""An adapter of its own for each row of a batch."""

import contextlib
from collections.abc import Iterator
from collections.abc import Sequence

import keras
import numpy as np

from keras_peft import adapted_model
from keras_peft import adapter_state
from keras_peft.methods.adapter import KernelAdapter


@contextlib.contextmanager
def adapter_names(
    model: keras.Model, names: Sequence[str | None]
) -> Iterator[keras.Model]:
    """Within, each row of a batch goes through the adapter of its own name.

    For serving: the base is computed once for requests to several adapters.
    Every adapter is applied to the whole batch and kept in its own rows. After
    the block the model is as it was before.

    Within it, call the model or its `predict_on_batch`, with as many rows as
    there are names. `predict_on_batch` is compiled anew in each block on
    TensorFlow and JAX.

    Args:
        model: An adapted model.
        names: For each row of the batch the name of an adapter, or `None` for
            the base alone.

    Raises:
        ValueError: if the model has no such adapter; if one of them changes
            more than kernels, or has another head than the others, so that
            rows cannot be told apart; on training, or on a batch of another
            size, within the block.

    Example:
    >>> with keras_peft.adapter_names(model, ["a", "b", None]):
    ...     outputs = model.predict_on_batch(three_rows)
    """
    names = list(names)
    _check_names(model, names)
    active = dict(model.peft.active)
    adapted_model.divide(model, names)
    try:
        yield model
    finally:
        adapted_model.undivide(model, active)


def _check_names(model, names):
    adapter_state.state_of(model)
    if not names:
        raise ValueError(
            "Name an adapter, or `None`, for each row of the batch. "
            f"Received: names={names}"
        )
    used = list(dict.fromkeys(names))
    for name in used:
        if name is not None:
            _check_kernels_alone(model, name)
    heads = [adapter_state.head_values(model, name) for name in used]
    for name, head in zip(used, heads, strict=True):
        if any(not np.array_equal(heads[0][key], head[key]) for key in head):
            raise ValueError(
                "All rows go through one head, but these adapters have heads "
                f"of their own: {used[0]!r} and {name!r}. Run them one after "
                f"another with `keras_peft.set_adapter`. Received: {names}"
            )


def _check_kernels_alone(model, name):
    adapter = adapter_state.named(model, name)
    leaves = adapter_state.leaves(model, name).values()
    if not all(isinstance(leaf, KernelAdapter) for leaf in leaves):
        raise ValueError(
            f"{type(adapter.method).__name__} does more than change kernels, "
            "and rows of a batch cannot be told apart in that. Run the adapter "
            f"alone, with `keras_peft.set_adapter`. Received: name={name!r}"
        )
