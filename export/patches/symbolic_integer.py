"""Symbolic integers of torch as numbers of Keras.

`ops.arange(length)` as in T5: Keras looks the type of a Python number up in a
table that does not know torch's symbolic integer. And `ops.mod(x, length)`:
making a tensor of the symbol fixes the length.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from keras_peft.replacing import replaced


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Lets symbolic integers pass for integers."""
    import torch
    from keras.src.backend.common import dtypes

    table = dtypes.PYTHON_DTYPES_MAP
    real = torch.as_tensor

    def as_tensor(data: Any, **options: Any) -> Any:
        symbolic = isinstance(data, torch.SymInt)
        return (torch.scalar_tensor if symbolic else real)(data, **options)

    table[torch.SymInt] = "int32"
    try:
        with replaced(torch, as_tensor=as_tensor):
            yield
    finally:
        del table[torch.SymInt]
