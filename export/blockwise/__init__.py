"""Kernels in 4 and 8 bits: what they are stored as, and how they are chosen."""

from keras_peft.export.blockwise.gptq import gptq
from keras_peft.export.blockwise.integers import Blockwise
from keras_peft.export.blockwise.integers import concatenate
from keras_peft.export.blockwise.mixture import Group
from keras_peft.export.blockwise.mixture import in_4_bits
from keras_peft.export.blockwise.rounding import quantize
from keras_peft.export.blockwise.search import search

__all__ = [
    "Blockwise",
    "Group",
    "concatenate",
    "gptq",
    "in_4_bits",
    "quantize",
    "search",
]
