"""`ops.arange(length)` on torch, where the length is a symbol, as in T5.

Keras looks the type of a Python number up in a table that does not know
torch's symbolic integer.
"""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Lets symbolic integers pass for integers."""
    import torch
    from keras.src.backend.common import dtypes

    table = dtypes.PYTHON_DTYPES_MAP
    table[torch.SymInt] = "int32"
    try:
        yield
    finally:
        del table[torch.SymInt]
