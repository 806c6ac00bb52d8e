"""What keras-hub leaves out of the configuration of a model that is saved.

A `LlamaBackbone` whose head is its table of tokens says nothing of that, and a
file of it is read as one with a head of its own, which has no weights there.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from keras_peft.replacing import replaced

_LLAMA = "keras_hub.src.models.llama.llama_backbone"


@contextlib.contextmanager
def complete_configs() -> Iterator[None]:
    """Within, such a model is saved with all it takes to load it."""
    module = sys.modules.get(_LLAMA)
    if module is None:
        yield
        return
    kind = module.LlamaBackbone
    real = kind.get_config

    def get_config(self: Any) -> dict[str, Any]:
        tied = self.token_embedding.tie_weights
        return {"tie_word_embeddings": tied, **real(self)}

    with replaced(kind, get_config=get_config):
        yield
