"""The changes of kernels that a folder of a LoRA adapter holds."""

import dataclasses
from typing import Any

import numpy as np

from keras_peft import adapter_io
from keras_peft.files import existing_folder
from keras_peft.methods.lora import LoRA

FACTORS = ("lora_kernel_a", "lora_kernel_b")
# What PiSSA and its kin subtract from their product.
_INITIAL = ("lora_initial_a", "lora_initial_b")
_HEAD = "head:"


@dataclasses.dataclass(frozen=True)
class LoRAFolder:
    """What one adapter folder holds."""

    folder: str
    method: LoRA
    settings: dict[str, Any]
    tensors: dict[str, np.ndarray]

    @property
    def layers(self) -> dict[str, dict]:
        return self.settings["layers"]

    @property
    def head(self) -> dict[str, np.ndarray]:
        tensors = self.tensors.items()
        return {k: value for k, value in tensors if k.startswith(_HEAD)}

    def change(self, path: str) -> tuple[np.ndarray, np.ndarray]:
        """`(a, b)` in float64 whose product changes the kernel at `path`."""
        a, b = (self._tensor(path, key) for key in FACTORS)
        if f"{path}.{_INITIAL[0]}" in self.tensors:
            initial = [self._tensor(path, key) for key in _INITIAL]
            a = np.concatenate([a, initial[0]], axis=1)
            b = np.concatenate([b, -initial[1]])
        return a, b * self.method.scale_of(path)

    def _tensor(self, path, key):
        return self.tensors[f"{path}.{key}"].astype("float64")


def read(path):
    """The `LoRAFolder` at `path`; raises if it is none."""
    folder = str(path)
    settings, method, tensors = adapter_io.read_files(existing_folder(path))
    if not isinstance(method, LoRA) or method.decompose:
        kind = "DoRA" if isinstance(method, LoRA) else type(method).__name__
        raise ValueError(
            f"Only changes of kernels by LoRA can be added up, and {kind} is "
            "none. Load the adapter, convert it with `keras_peft.to_lora("
            f"model)`, and save it again. Received: {folder!r} with {method}"
        )
    if method.use_bias:
        raise ValueError(
            "Only changes of kernels can be added up, and LoRA with "
            "`use_bias=True` changes biases too. Merge such an adapter, or "
            f"train it without. Received: {folder!r} with {method}"
        )
    raw = [p for p, kind in settings["layers"].items() if not kind["kernel"]]
    if raw:
        raise ValueError(
            "Only changes of kernels that are one matrix can be added up, and "
            "these layers hold raw weights, such as those of experts: "
            f"{', '.join(raw[:8])}. Activate several adapters at once with "
            f"`keras_peft.set_adapter` instead. Received: {folder!r}"
        )
    source = LoRAFolder(folder, method, settings, tensors)
    wrong = [w for path in source.layers for w in _wrong_in(source, path)]
    if wrong:
        raise ValueError(
            "The adapter's tensors do not fit its settings: "
            f"{'; '.join(wrong[:8])}. Save it again. Received: {folder!r}"
        )
    return source


def _wrong_in(source, path):
    """What speaks against the tensors of one layer."""
    keys = FACTORS
    if any(f"{path}.{key}" in source.tensors for key in _INITIAL):
        keys += _INITIAL
    missing = [k for k in keys if f"{path}.{k}" not in source.tensors]
    if missing:
        return [f"missing `{path}.{key}`" for key in missing]
    rank, wrong = source.method.rank_of(path), []
    for key in keys:
        tensor = source.tensors[f"{path}.{key}"]
        axis = 1 if key.endswith("a") else 0
        if tensor.ndim != 2 or tensor.shape[axis] != rank:
            wrong.append(f"`{path}.{key}` of {tensor.shape} is not rank {rank}")
        elif not np.isfinite(tensor).all():
            wrong.append(f"`{path}.{key}` holds NaN or infinity")
    return wrong
