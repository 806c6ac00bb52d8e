"""Folding adapters into the kernels, and taking them out again."""

import contextlib
import dataclasses
import hashlib
import weakref
from collections.abc import Iterator

import keras
import numpy as np

from keras_peft import adapted_model
from keras_peft import adapter_state
from keras_peft import base_format
from keras_peft import layer_tree
from keras_peft.adapter_state import AdapterState
from keras_peft.kernels import read
from keras_peft.packed_kernel import PackedKernel


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """How well the merged kernels hold the change that was merged.

    Attributes:
        errors: `{path: error}`, the norm of what rounding to the kernel's
            dtype lost, over the norm of the merged change. About 1e-7 times
            the kernel's size over the change's in float32; in bfloat16 it
            can be large where the change is small.
        dtypes: `{path: dtype}` of the merged weights.
        base_errors: `{path: error}` of a base in 4 or 8 bits, adapted or not:
            the norm of what rounding lost when the base was quantized, over
            the norm of the kernel. The adapters were trained over what was
            left, and that is what they are merged into. By `path.weight` in
            a bank of experts, and not known of a base that Keras quantized.
    """

    errors: dict[str, float]
    dtypes: dict[str, str]
    base_errors: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def worst(self) -> tuple[str, float]:
        """`(path, error)` of the layer that lost most."""
        path = max(self.errors, key=lambda path: self.errors[path])
        return path, self.errors[path]


@dataclasses.dataclass
class _Merged:
    """What `unmerge` needs. Values are kept in host memory."""

    state: AdapterState
    adapters: dict[str, dict[str, keras.Layer]]
    values: dict[str, list[tuple[keras.Variable, np.ndarray]]]
    digests: dict[str, list[str]]
    packed: dict[str, list[PackedKernel]]


_MERGED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def merge(model: keras.Model) -> MergeReport:
    """Folds the active adapters into the kernels of `model`, in place.

    Each merged kernel is computed in float32 from the base kernel and rounded
    once to the kernel's dtype. The result is a plain Keras model that computes
    what the adapted one did, up to that rounding. `unmerge` brings base and
    adapters back; for it the base weights are kept in host memory as long as
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
    _check_mergeable(state, layers)
    values, errors = {}, {}
    packed = base_format.unpack(model)
    try:
        for path, layer in layers.items():
            deltas = _deltas(layer)
            values[path] = [(v, _bits(v)) for v, _ in deltas]
            errors[path] = _fold(path, deltas)
    except BaseException:
        _restore(values)
        base_format.repack(model, packed)
        raise
    dtypes = {path: held[0][0].dtype for path, held in values.items()}
    base_errors = _base_errors(packed)
    adapters = adapted_model.strip(model)
    digests = {path: _digests(held) for path, held in values.items()}
    _MERGED[model] = _Merged(state, adapters, values, digests, packed)
    return MergeReport(errors, dtypes, base_errors)


def _base_errors(packed):
    return {
        f"{path}.{kernel.name}" if len(kernels) > 1 else path: kernel.error
        for path, kernels in packed.items()
        for kernel in kernels
        if kernel.error is not None
    }


def _check_mergeable(state, layers):
    stuck = [
        f"{name!r} ({type(state.adapters[name].method).__name__})"
        for name in state.active
        if not all(
            layer.adapters[name].mergeable
            for layer in layers.values()
            if name in layer.adapters
        )
    ]
    if stuck:
        raise ValueError(
            "What these adapters do is no change of the model's weights, so "
            "it cannot be merged into them. Export or save the adapted model "
            "as it is, or choose other adapters with "
            f"`keras_peft.set_adapter`. Received: adapters {', '.join(stuck)}"
        )


def _deltas(layer):
    """`[(variable, change)]` of all the layer's adapters together."""
    changes = {}
    for adapter in layer.adapters.values():
        for variable, change in adapter.deltas():
            if isinstance(variable, PackedKernel):
                variable = vars(layer)[variable.attribute]
            _, total = changes.get(id(variable), (variable, 0.0))
            changes[id(variable)] = variable, total + change
    return list(changes.values())


def _fold(path, deltas):
    """Merges one layer; returns what rounding lost of the change."""
    lost = size = 0.0
    for variable, change in deltas:
        base = read(variable)
        merged = base + change  # float32
        if not np.isfinite(merged).all():
            raise ValueError(
                "The merged kernel would not be finite; its adapter or its "
                "base holds NaN or infinity. Nothing was merged. "
                f"Received: layer={path!r}"
            )
        variable.assign(merged)
        held = read(variable).astype("float64") - base
        lost += np.square(held - change).sum()
        size += np.square(change.astype("float64")).sum()
    return float(np.sqrt(lost / size)) if size else 0.0


def unmerge(model: keras.Model) -> keras.Model:
    """Undoes `merge`: the base has the bits it had, the adapters are back.

    Raises:
        ValueError: if the model was not merged in this process, or its
            kernels have changed since.
    """
    merged = _MERGED.get(model)
    if merged is None:
        raise ValueError(
            "The model was not merged in this process, so its base weights "
            "are not known. Load the base and `keras_peft.load_adapter()` "
            f"instead. Received: model={getattr(model, 'name', model)!r}"
        )
    if changed := _changed(merged):
        raise ValueError(
            "The merged kernels were changed after `merge`; unmerging would "
            f"undo that too. Received: changed layers={changed}"
        )
    _restore(merged.values)
    base_format.repack(model, merged.packed)
    del _MERGED[model]
    adapted_model.reinstall(model, merged.state, merged.adapters)
    return model


def merged_adapters(
    model: keras.Model,
) -> dict[str, dict[str, keras.Layer]]:
    """`{name: {path: adapter}}` of what the kernels hold since `merge`.

    Empty if the model was not merged, or its kernels were changed since.
    """
    merged = _MERGED.get(model)
    if merged is None or _changed(merged):
        return {}
    return merged.adapters


@contextlib.contextmanager
def as_base(model: keras.Model) -> Iterator[bool]:
    """Within, a merged model computes what it did before its adapters.

    Yields whether it was merged in this process; if not, nothing changes.
    """
    merged = _MERGED.get(model)
    if merged is None or adapter_state.is_adapted(model) or _changed(merged):
        yield False
        return
    now = {
        path: [(variable, _bits(variable)) for variable, _ in held]
        for path, held in merged.values.items()
    }
    try:
        _restore(merged.values)
        yield True
    finally:
        _restore(now)


def _changed(merged):
    return [
        path
        for path, held in merged.values.items()
        if _digests(held) != merged.digests[path]
    ]


def _bits(variable):
    return keras.ops.convert_to_numpy(variable)


def _digests(held):
    return [
        hashlib.sha256(_bits(variable).tobytes()).hexdigest()
        for variable, _ in held
    ]


def _restore(values):
    for held in values.values():
        for variable, bits in held:
            variable.assign(bits)
