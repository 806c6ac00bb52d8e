"""Training with the integers that are shipped, and finding them again."""

import keras

from keras_peft import adapter_state
from keras_peft.export.blockwise import Blockwise
from keras_peft.merge import merged_adapters
from keras_peft.methods.lora import LoRA
from keras_peft.methods.method import Method
from keras_peft.methods.quantize_aware import QuantizeAwareAdapter
from keras_peft.methods.quantize_aware import QuantizeAwareLoRA

BITS = {"int4": 4, "int8": 8}
# What LoRA does beside adding a product to the kernel.
_NOT_IN_THE_KERNEL = ("dropout", "decompose", "use_bias")


def aware(method: Method, quantize_aware: str) -> QuantizeAwareLoRA:
    """The settings of `method`, for a kernel in integers."""
    if quantize_aware not in BITS:
        raise ValueError(
            "`quantize_aware` must be 'int4', 'int8' or None. "
            f"Received: quantize_aware={quantize_aware!r}"
        )
    if not isinstance(method, LoRA):
        raise ValueError(
            "`quantize_aware` is for `keras_peft.LoRA`, of which the change "
            f"is rounded with the kernel. Received: method={method!r}"
        )
    if used := [k for k in _NOT_IN_THE_KERNEL if getattr(method, k)]:
        raise ValueError(
            "What is rounded is the sum of the kernel and `A @ B`, which "
            f"leaves no place for {', '.join(map(repr, used))}. Leave it out. "
            f"Received: method={method!r}"
        )
    settings = method.get_config()
    for name in _NOT_IN_THE_KERNEL:
        del settings[name]
    return QuantizeAwareLoRA(BITS[quantize_aware], **settings)


def integers(model: keras.Model) -> dict[str, Blockwise]:
    """`{path: kernel in integers}` of what trained quantization-aware.

    Asked of a model with such an adapter active, or after `merge`, which
    writes exactly these kernels' values where they are float32. An exporter
    that stores them as they are ships the kernels that were trained.

    Raises:
        ValueError: if another adapter, or another strength than 1, moved one
            of these kernels off its integers.
    """
    merged = not adapter_state.is_adapted(model)
    named = merged_adapters(model) if merged else _live_adapters(model)
    by_path: dict[str, list] = {}
    for leaves in named.values():
        for path, adapter in leaves.items():
            if float(adapter.strength):
                by_path.setdefault(path, []).append(adapter)
    found = {
        path: adapters
        for path, adapters in by_path.items()
        if any(isinstance(a, QuantizeAwareAdapter) for a in adapters)
    }
    moved = [
        path
        for path, adapters in found.items()
        if len(adapters) > 1 or float(adapters[0].strength) != 1
    ]
    if moved:
        raise ValueError(
            "A kernel that trained quantization-aware has its integers only "
            "with its own adapter, at strength 1. Choose that one alone with "
            f"`keras_peft.set_adapter`. Received: other changes of {moved[:8]}"
        )
    return {
        path: adapter.integers(merged) for path, (adapter,) in found.items()
    }


def _live_adapters(model):
    names = model.peft.adapters
    return {name: adapter_state.leaves(model, name) for name in names}
