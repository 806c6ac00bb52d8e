"""keras-hub's attention of torch and JAX, traced on TensorFlow.

There it calls Keras' fused attention. On TensorFlow it takes steps of its own,
which give other numbers: Qwen's sliding window counts there alone, and a token
all of whose keys are masked attends to none of them instead of to all.
"""

import contextlib
import sys
from collections.abc import Iterator

from keras_peft.replacing import replaced

_NAME = "fused_attention_op_available"


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Answers in every module of keras-hub that fused attention is there."""
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("keras_hub.") and hasattr(module, _NAME):
                answer = {_NAME: lambda: True}
                stack.enter_context(replaced(module, **answer))
        yield
