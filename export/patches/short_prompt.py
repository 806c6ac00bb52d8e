"""Prompts of Gemma 3n that are shorter than their cache.

keras-hub masks as many places as there are tokens, and all of a cache must be
masked; its own generation fills a cache at once.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import keras

_MODULE = "keras_hub.src.models.gemma3n.gemma3n_causal_lm"


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Takes every place of a cache for one of the text."""
    module = sys.modules.get(_MODULE)
    if module is None:
        yield
        return
    model = module.Gemma3nCausalLM
    real = model.call_with_cache

    def call_with_cache(
        self: Any,
        token_ids: Any,
        cache: Any,
        cache_update_index: Any,
        padding_mask: Any = None,
        **options: Any,
    ) -> Any:
        if padding_mask is None:
            # (rows, layers, keys and values, heads, length, size)
            shape = keras.ops.shape(cache)
            padding_mask = keras.ops.ones((shape[0], shape[4]), "bool")
        return real(
            self,
            token_ids,
            cache,
            cache_update_index,
            padding_mask=padding_mask,
            **options,
        )

    model.call_with_cache = call_with_cache
    try:
        yield
    finally:
        model.call_with_cache = real
