"""Decoders with a cache: one signature for a prompt, one for each new token.

Keras-hub's `call_with_cache` gives the logits of some tokens, the cache that
holds keys and values of those before them, and takes the place where they go.
"""

import inspect
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_peft.export.result import Forward
from keras_peft.export.result import TensorSpec
from keras_peft.export.signature import ModelInput
from keras_peft.export.signature import Signature

PREFILL, DECODE = "prefill", "decode"
TOKENS, POSITION, LOGITS = "token_ids", "cache_update_index", "logits"

# How many tokens of a checked text are decoded one by one: the second reads
# what the first has written.
_DECODED = 2
# Room that a checked text leaves in the cache: nothing may depend on it.
_ROOM = 5


def generates(model: keras.Model, signature: Signature) -> bool:
    """Whether `model` writes text, with a cache, from text alone."""
    names = {spec.name for spec in signature.inputs}
    return hasattr(model, "call_with_cache") and names == {
        TOKENS,
        "padding_mask",
    }


def functions(model: Any) -> dict[str, tuple[Any, tuple[ModelInput, ...]]]:
    """What the two signatures compute, and from what."""
    structure, caches = _caches(model)

    def step(tokens: Any, *rest: Any) -> list[Any]:
        *cache, position = rest
        cache = keras.tree.pack_sequence_as(structure, cache)
        logits, _, cache = model.call_with_cache(tokens, cache, position)
        return [logits, *keras.tree.flatten(cache)]

    position = ModelInput(POSITION, "int32", ())
    return {
        name: (
            step,
            (ModelInput(TOKENS, "int32", ("batch", size)), *caches, position),
        )
        for name, size in ((PREFILL, "sequence"), (DECODE, 1))
    }


def new_cache(model: Any, rows: int, length: int) -> tuple[Any, Any]:
    """What keras-hub makes of some texts: its stream, and a filled cache."""
    parameters = inspect.signature(model._build_cache).parameters.values()
    # Images and masks, of which a text has none.
    others = [p for p in parameters if p.default is p.empty][1:]
    tokens = np.ones((rows, length), "int32")
    hidden, cache = model._build_cache(tokens, *[None] * len(others))
    return hidden, cache


def _caches(model: Any) -> tuple[Any, list[ModelInput]]:
    """The nest of the model's cache, and its tensors with their free axes."""
    _, structure = new_cache(model, 2, 11)
    _, larger = new_cache(model, 3, 13)
    pairs = zip(
        keras.tree.flatten(structure), keras.tree.flatten(larger), strict=True
    )
    free = {(2, 3): "batch", (11, 13): "cache_length"}
    return structure, [
        ModelInput(
            "cache",
            keras.backend.standardize_dtype(small.dtype),
            tuple(
                free.get(sizes, sizes[0])
                for sizes in zip(small.shape, large.shape, strict=True)
            ),
        )
        for small, large in pairs
    ]


def names(count: int) -> tuple[list[str], list[str]]:
    """Names of the inputs and the outputs, by how many caches there are."""
    caches = ["cache"] if count == 1 else [f"cache_{n}" for n in range(count)]
    return [TOKENS, *caches, POSITION], [LOGITS, *caches]


def spec(name: str, shape: Sequence[int]) -> TensorSpec:
    """An input or output of a prompt; -1 stands for a free size."""
    length = "cache_length" if name.startswith("cache") else "sequence"
    free = iter(("batch", length))
    return TensorSpec(
        name,
        "int32" if name in (TOKENS, POSITION) else "float32",
        tuple(next(free) if size < 0 else size for size in shape),
    )


def forward(interpreter: Any) -> Forward:
    """The logits of whole texts, the last tokens of which are decoded."""
    prefill = interpreter.get_signature_runner(PREFILL)
    decode = interpreter.get_signature_runner(DECODE)

    def run(batch: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        tokens = batch[TOKENS]
        rows, length = tokens.shape
        state = empty_caches(prefill, rows, length + _ROOM)
        start = max(length - _DECODED, 1)
        parts = []
        for first, last in ((0, start), *_single(start, length)):
            step = decode if first else prefill
            position = {POSITION: np.array(first, "int32")}
            part = {TOKENS: tokens[:, first:last]}
            state = step(**part, **position, **state)
            parts.append(state.pop(LOGITS))
        return [np.concatenate(parts, axis=1)]

    return run


def _single(start: int, stop: int) -> list[tuple[int, int]]:
    return [(n, n + 1) for n in range(start, stop)]


def empty_caches(prefill: Any, rows: int, length: int) -> dict[str, np.ndarray]:
    """Caches of zeros for some rows, with room for `length` tokens."""
    caches = {}
    for name, details in prefill.get_input_details().items():
        if name not in (TOKENS, POSITION):
            free = iter((rows, length))
            shape = [
                next(free) if size < 0 else int(size)
                for size in details["shape_signature"]
            ]
            caches[name] = np.zeros(shape, details["dtype"])
    return caches


def without_padding(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with every token taken for text, as a cache takes it."""
    return {
        name: np.ones_like(value) if name == "padding_mask" else value
        for name, value in batch.items()
    }
