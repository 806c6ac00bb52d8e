"""The two files of a Hugging Face PEFT folder."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

SETTINGS = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"

# What PEFT puts before the modules of the class that it wrapped.
PREFIX = "base_model.model."

# Settings that say nothing of what an adapter computes.
_ABOUT = (
    *("peft_type", "task_type", "auto_mapping", "peft_version", "revision"),
    *("base_model_name_or_path", "inference_mode", "runtime_config"),
)


def is_peft_folder(folder: Path) -> bool:
    """Whether a folder is of PEFT's format and not of keras_peft's own."""
    return (folder / SETTINGS).is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """The settings; raises a `ValueError` if they are none of PEFT's."""
    try:
        config = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if not isinstance(config["peft_type"], str):
            raise TypeError(f"peft_type={config['peft_type']!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"`{SETTINGS}` is damaged or none of PEFT's ({error!r}). Save the "
            f"adapter again. Received: {str(folder)!r}"
        ) from error
    return config


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """`{key: float32 array}`; nothing from the file is executed."""
    path = folder / TENSORS
    if not path.is_file() and (folder / _PICKLE).is_file():
        raise ValueError(
            f"The folder holds its weights in `{_PICKLE}`, a pickle, which "
            "can run code when it is read. Load it once with PEFT and save it "
            f"with `safe_serialization=True`. Received: {str(folder)!r}"
        )
    try:
        tensors = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"`{TENSORS}` is missing, truncated or no safetensors file "
            f"({error}). Save the adapter again. Received: {str(folder)!r}"
        ) from error
    # PEFT keeps adapters in the dtype of their base; here they are float32.
    return {
        key: np.asarray(value, None if value.dtype.kind in "iub" else "float32")
        for key, value in tensors.items()
    }


def write(folder: Path, config: dict, tensors: dict[str, np.ndarray]) -> None:
    """Writes both files into an existing folder."""
    tensors = {
        key: np.ascontiguousarray(value, "float32")
        for key, value in tensors.items()
    }
    # transformers wants to know whose layout the tensors have.
    data = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    (folder / TENSORS).write_bytes(data)
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / SETTINGS).write_text(text, encoding="utf-8")


def unknown_settings(config: dict, known: tuple[str, ...]) -> list[str]:
    """What speaks against settings beyond those in `known`.

    PEFT drops a setting that it does not know. But a newer one may change what
    the same tensors compute, so any that is set is refused here.
    """
    return [
        f"`{key}={_short(value)}` in `{SETTINGS}` may change what the adapter "
        "computes, in a way that is not known here"
        for key, value in config.items()
        if key not in (*_ABOUT, *known) and value
    ]


def _short(value):
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def by_pattern(patterns: dict | None, module: str, default: Any) -> Any:
    """The entry of a PEFT pattern dict for a module."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def targeted(config: dict, module: str) -> bool:
    """Whether a config names a module, given without its class' prefix."""
    named = config.get("target_modules")
    # A module that is saved as a whole carries no adapter.
    others = ("exclude_modules", "modules_to_save")
    if not isinstance(named, list) or any(
        matches(config.get(key), module) for key in others
    ):
        return False
    layers = config.get("layers_to_transform")
    index = re.search(r"\.(\d+)\.", module)
    if layers is not None and index:
        layers = [layers] if isinstance(layers, int) else layers
        if int(index[1]) not in layers:
            return False
    return matches(named, module)


def matches(names: str | list[str] | None, module: str) -> bool:
    """Whether `names` are PEFT's for a module, given without a prefix."""
    if isinstance(names, str):
        return re.fullmatch(rf"(.*\.)?{names}", module) is not None
    return any(
        name == module
        or module.endswith("." + name)
        or name.endswith("." + module)
        for name in names or ()
    )
