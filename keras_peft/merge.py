"""Folding adapters into the kernels, and taking them out again."""

import dataclasses
import hashlib
import weakref

import keras
import numpy as np

from keras_peft import adapted_model
from keras_peft import adapter_state
from keras_peft import layer_tree
from keras_peft.adapter_state import AdapterState
from keras_peft.kernels import kernel_of


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """How well the merged kernels hold the change that was merged.

    Attributes:
        errors: `{path: error}`, the norm of what rounding to the kernel's
            dtype lost, over the norm of the merged change. About 1e-7 times
            the kernel's size over the change's in float32; in bfloat16 it
            can be large where the change is small.
        dtypes: `{path: dtype}` of the kernels.
    """

    errors: dict[str, float]
    dtypes: dict[str, str]

    @property
    def worst(self) -> tuple[str, float]:
        """`(path, error)` of the layer that lost most."""
        path = max(self.errors, key=lambda path: self.errors[path])
        return path, self.errors[path]


@dataclasses.dataclass
class _Merged:
    """What `unmerge` needs. Kernels are kept in host memory."""

    state: AdapterState
    adapters: dict[str, dict[str, keras.Layer]]
    kernels: dict[str, np.ndarray]
    digests: dict[str, str]


_MERGED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def merge(model: keras.Model) -> MergeReport:
    """Folds the active adapters into the kernels of `model`, in place.

    Each merged kernel is computed in float32 from the base kernel and rounded
    once to the kernel's dtype. The result is a plain Keras model that computes
    what the adapted one did, up to that rounding. `unmerge` brings base and
    adapters back; for it the base kernels are kept in host memory as long as
    the model lives.

    Returns:
        A `MergeReport` with the rounding error of every layer.

    Raises:
        ValueError: if the model has no active adapter, or a merged kernel
            would not be finite. The model is then as it was.
    """
    if model in _MERGED and not adapter_state.is_adapted(model):
        raise ValueError(
            "The model is merged already. `keras_peft.unmerge(model)` takes "
            f"the adapters out again. Received: model={model.name!r}"
        )
    state = adapter_state.state_of(model)
    if not state.active:
        raise ValueError(
            "No adapter is active, so there is nothing to merge. Choose with "
            "`keras_peft.set_adapter(model, name)`. "
            f"Received: adapters={list(state.adapters)}"
        )
    layers = dict(layer_tree.adapted_layers(model))
    kernels = {path: _bits(layer) for path, layer in layers.items()}
    try:
        errors = {path: _fold(path, layer) for path, layer in layers.items()}
    except BaseException:
        _restore(layers, kernels)
        raise
    dtypes = {
        path: kernel_of(layer).variable.dtype for path, layer in layers.items()
    }
    adapters = adapted_model.strip(model)
    digests = {path: _digest(_bits(layer)) for path, layer in layers.items()}
    _MERGED[model] = _Merged(state, adapters, kernels, digests)
    return MergeReport(errors, dtypes)


def _fold(path, layer):
    """Merges one layer; returns what rounding lost of the change."""
    view = kernel_of(layer)
    base = view.read()
    change = sum(a.kernel_delta(base) for a in layer.adapters.values())
    merged = base + change  # float32
    if not np.isfinite(merged).all():
        raise ValueError(
            "The merged kernel would not be finite; its adapter or its base "
            "holds NaN or infinity. Nothing was merged. "
            f"Received: layer={path!r}"
        )
    view.variable.assign(view.from_matrix(merged))
    held = view.read().astype("float64") - base
    size = np.linalg.norm(change)
    return float(np.linalg.norm(held - change) / size) if size else 0.0


def unmerge(model: keras.Model) -> keras.Model:
    """Undoes `merge`: the base has the bits it had, the adapters are back.

    Raises:
        ValueError: if the model was not merged in this process, or its
            kernels have changed since.
    """
    merged = _MERGED.get(model)
    if merged is None:
        raise ValueError(
            "The model was not merged in this process, so its base kernels "
            "are not known. Load the base and `keras_peft.load_adapter()` "
            f"instead. Received: model={getattr(model, 'name', model)!r}"
        )
    layers = dict(layer_tree.walk(model))
    changed = [
        path
        for path, digest in merged.digests.items()
        if _digest(_bits(layers[path])) != digest
    ]
    if changed:
        raise ValueError(
            "The merged kernels were changed after `merge`; unmerging would "
            f"undo that too. Received: changed layers={changed}"
        )
    _restore(layers, merged.kernels)
    del _MERGED[model]
    adapted_model.reinstall(model, merged.state, merged.adapters)
    return model


def _bits(layer):
    return keras.ops.convert_to_numpy(kernel_of(layer).variable)


def _digest(array):
    return hashlib.sha256(array.tobytes()).hexdigest()


def _restore(layers, kernels):
    for path, kernel in kernels.items():
        kernel_of(layers[path]).variable.assign(kernel)
