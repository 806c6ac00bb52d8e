"""Prompts of Gemma 3n that are shorter than their cache.

keras-hub masks as many places as there are tokens, and all of a cache must be
masked; its own generation fills a cache at once.
"""

import sys
from contextlib import AbstractContextManager
from contextlib import nullcontext
from typing import Any

import keras

from keras_peft.replacing import replaced

_MODULE = "keras_hub.src.models.gemma3n.gemma3n_causal_lm"


def patched() -> AbstractContextManager[None]:
    """Takes every place of a cache for one of the text."""
    module = sys.modules.get(_MODULE)
    if module is None:
        return nullcontext()
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

    return replaced(model, call_with_cache=call_with_cache)
