"""`ops.erfinv` on torch, as in the feed-forward part of Gemma 3n.

ONNX has no operator for it, and torch's exporter no other words.
"""

from contextlib import AbstractContextManager
from typing import Any

from keras_peft.replacing import replaced

# Single precision, from Giles, "Approximating the erfinv function" (2010):
# polynomials of w = -log(1 - x^2), for w below 5 and above.
_NEAR = (
    *(2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06),
    *(0.00021858087, -0.00125372503, -0.00417768164, 0.246640727),
    1.50140941,
)
_FAR = (
    *(-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844),
    *(0.00573950773, -0.0076224613, 0.00943887047, 1.00167406),
    2.83297682,
)


def patched() -> AbstractContextManager[None]:
    """Computes it by polynomials."""
    import torch
    from keras.src.backend.torch import math

    def erfinv(x: Any) -> Any:
        x = math.convert_to_tensor(x)
        w = -torch.log((1 - x) * (1 + x))
        near = _polynomial(_NEAR, w - 2.5)
        far = _polynomial(_FAR, torch.sqrt(torch.clamp(w, min=5.0)) - 3.0)
        return x * torch.where(w < 5.0, near, far)

    return replaced(math, erfinv=erfinv)


def _polynomial(factors: tuple[float, ...], x: Any) -> Any:
    total = factors[0]
    for factor in factors[1:]:
        total = total * x + factor
    return total
