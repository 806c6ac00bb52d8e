"""Kernels in 4 and 8 bits: what they are stored as, and how they are chosen."""

from keras_peft.export.blockwise.integers import Blockwise
from keras_peft.export.blockwise.integers import concatenate
from keras_peft.export.blockwise.rounding import quantize

__all__ = ["Blockwise", "concatenate", "quantize"]
