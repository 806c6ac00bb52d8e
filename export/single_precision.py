"""A float32 copy of a model that trained in less."""

import re
import tempfile
import zipfile
from pathlib import Path

import keras

from keras_peft.complete_configs import complete_configs

_LESS = re.compile(r'"(?:mixed_)?b?float16"')


def in_float32(model: keras.Model) -> tuple[keras.Model, list[str]]:
    """The model to export, and what a user should know about it."""
    if not computes_in_less(model):
        return model, []
    return as_float32(model), [
        "Layers that compute in float16 or bfloat16 were exported, and "
        "checked, in float32."
    ]


def computes_in_less(model: keras.Model) -> bool:
    """Whether a layer computes or stores in bfloat16 or float16."""
    return any(
        "float16" in str(layer.compute_dtype)
        or "float16" in str(layer.variable_dtype)
        for layer in model._flatten_layers()
    )


def as_float32(model: keras.Model) -> keras.Model:
    """A copy with the same weights whose layers all compute in float32.

    A graph is exported in float32 and quantized from there. Rounding every
    activation to 8 bits of mantissa, as bfloat16 training does, would hide
    whether the graph equals the model.
    """
    with tempfile.TemporaryDirectory() as name:
        saved, copy = Path(name) / "saved.keras", Path(name) / "copy.keras"
        with complete_configs():
            model.save(saved)
        with zipfile.ZipFile(saved) as old, zipfile.ZipFile(copy, "w") as new:
            for entry in old.namelist():
                content = old.read(entry)
                if entry == "config.json":
                    text = content.decode()
                    content = _LESS.sub('"float32"', text).encode()
                new.writestr(entry, content)
        # The file was written by this process a moment ago.
        return keras.saving.load_model(copy, compile=False, safe_mode=False)
