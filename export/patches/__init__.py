"""Mends of the libraries that trace, in force while they trace and no longer.

One module mends one defect. Its docstring says which, and it has

- `patched()`, a context manager that mends a library and puts everything back,
  or
- `OPERATORS`, handlers of operators that tf2onnx does not know:
  `{name: (function, arguments)}`.

Some have TensorFlow compute what keras-hub does on another backend, for models
that live there.

A test shows of each one, on the smallest model that needs it, that the library
alone still fails: a patch whose time is over is reported there.
"""

import contextlib
from collections.abc import Collection
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from keras_peft.export.patches import delta_rule
from keras_peft.export.patches import erfc
from keras_peft.export.patches import erfinv
from keras_peft.export.patches import fourier
from keras_peft.export.patches import fused_attention
from keras_peft.export.patches import grouped_convolution
from keras_peft.export.patches import integer_arithmetic
from keras_peft.export.patches import masked_keys
from keras_peft.export.patches import new_axis
from keras_peft.export.patches import outer_product
from keras_peft.export.patches import pixel_attention
from keras_peft.export.patches import plain_product
from keras_peft.export.patches import recurrence
from keras_peft.export.patches import roll
from keras_peft.export.patches import short_prompt
from keras_peft.export.patches import stored_positions
from keras_peft.export.patches import symbolic_integer
from keras_peft.export.patches import symbolic_repeat
from keras_peft.export.patches import symbolic_size
from keras_peft.export.patches import take_along_axis
from keras_peft.export.patches import whole_products

PATCHES: dict[str, tuple[ModuleType, ...]] = {
    # While the process that traces reads the file of a model.
    "load": (pixel_attention, stored_positions),
    "litert": (
        delta_rule,
        fourier,
        integer_arithmetic,
        new_axis,
        outer_product,
        pixel_attention,
        plain_product,
        recurrence,
        roll,
        short_prompt,
        symbolic_size,
    ),
    "tensorflow": (
        delta_rule,
        erfc,
        fourier,
        grouped_convolution,
        pixel_attention,
        symbolic_size,
        whole_products,
    ),
    "torch": (erfinv, symbolic_integer, symbolic_repeat, take_along_axis),
}
# For TensorFlow, by the backend that a model comes from.
COMING_FROM: dict[str, tuple[ModuleType, ...]] = {
    "jax": (fused_attention,),
    "torch": (fused_attention, masked_keys),
}


@contextlib.contextmanager
def applied(
    tracer: str,
    but: Collection[ModuleType] = (),
    source: str = "tensorflow",
) -> Iterator[None]:
    """Within, the libraries of a tracer are mended, `but` for some.

    `source` is the backend on which the model was before it was traced by
    TensorFlow.
    """
    mends = PATCHES[tracer]
    if tracer in ("litert", "tensorflow"):
        mends += COMING_FROM.get(source, ())
    with contextlib.ExitStack() as stack:
        for patch in mends:
            if patch not in but and hasattr(patch, "patched"):
                stack.enter_context(patch.patched())
        yield


def operators(but: Collection[ModuleType] = ()) -> dict[str, Any]:
    """Handlers for tf2onnx, `but` for those of some patches."""
    return {
        name: handler
        for patch in PATCHES["tensorflow"]
        if patch not in but
        for name, handler in getattr(patch, "OPERATORS", {}).items()
    }
