"""A frozen base in 4 or 8 bits."""

import contextlib
import functools
from collections.abc import Iterator
from collections.abc import Mapping

import keras

from keras_peft import keras_quantized
from keras_peft import layer_tree
from keras_peft import packed_bank
from keras_peft import packed_kernel
from keras_peft.packed_kernel import PackedKernel
from keras_peft.packed_kernel import formats
from keras_peft.patterns import lies_in
from keras_peft.quantized import FORMATS
from keras_peft.quantized import check_format
from keras_peft.replacing import replaced


@contextlib.contextmanager
def quantized_base(base: str) -> Iterator[None]:
    """Within, models come with their kernels in 4 or 8 bits.

    A preset is read into them tensor by tensor, so that the model never exists
    in 16 bits. `keras_peft.adapt` adds adapters to it afterwards, with no need
    of `base`, and `keras_peft.merge` gives it kernels in its dtype again.

    What is quantized are `Dense` and `EinsumDense` layers, and banks of
    experts, of 64 inputs and outputs or more: make a head that is to train
    outside of the block. A bank is in floating point while it is built, one
    at a time.

    Args:
        base: `"nf4"`, `"int4"` or `"int8"`, as in `keras_peft.adapt`.

    Raises:
        ValueError: if `base` is none of these.

    Example:
    >>> with keras_peft.quantized_base("nf4"):
    ...     model = keras_hub.models.CausalLM.from_preset("llama3_8b_en")
    >>> keras_peft.adapt(model, keras_peft.LoRA(rank=16))
    """
    check_format(base)
    kinds = keras.layers.Dense, keras.layers.EinsumDense
    with contextlib.ExitStack() as stack:
        for kind in kinds:
            build = _build(kind.build, FORMATS[base])
            stack.enter_context(replaced(kind, build=build))
        stack.enter_context(layer_tree.after_build(_pack_bank(FORMATS[base])))
        yield


def _build(build, form):
    # Keras reads the names of the arguments.
    @functools.wraps(build)
    def build_packed(layer, *args, **kwargs):
        # The random numbers would be drawn for nothing.
        initializer = layer.kernel_initializer
        layer.kernel_initializer = keras.initializers.Zeros()
        build(layer, *args, **kwargs)
        layer.kernel_initializer = initializer
        if packed_kernel.can_pack(layer):
            packed_kernel.pack(layer, form, empty=True)

    return build_packed


def _pack_bank(form):
    def pack(layer):
        if packed_bank.can_pack(layer):
            packed_bank.pack(layer, form, empty=True)

    return pack


def formats_to_take(
    model: keras.Model, base: str | None, head: list[str]
) -> dict[str, str]:
    """`{path: base}` of the layers that are still to be packed.

    Raises a `ValueError` if they cannot, or a layer of the head is packed.
    """
    check_format(base)
    found = formats(model)
    if packed := [path for path in found if lies_in(path, head)]:
        raise ValueError(
            f"The head trains, which a kernel in {found[packed[0]]} cannot. "
            "Make the head outside of `keras_peft.quantized_base`, around a "
            f"backbone that was loaded inside. Received: head={packed}"
        )
    if base is None:
        return {}
    if others := {form for form in found.values() if form != base}:
        raise ValueError(
            f"The base is in {', '.join(others)} already. Leave `base` out. "
            f"Received: base={base!r}"
        )
    layers = {
        path: layer
        for path, layer in layer_tree.walk(model)
        if not lies_in(path, head) and path not in found
    }
    kernels = [p for p, la in layers.items() if packed_kernel.can_pack(la)]
    banks = [p for p, la in layers.items() if packed_bank.can_pack(la)]
    if adapted := [p for p in banks if layer_tree.is_adapted(layers[p])]:
        raise ValueError(
            "Banks of experts carry adapters over kernels in floating point. "
            "Quantize the base with the first adapter of a model. "
            f"Received: base={base!r}, adapted banks {adapted}"
        )
    if not kernels and not banks and not found:
        raise ValueError(
            "The base has no kernel to quantize: a `Dense` or `EinsumDense` "
            "layer, or a bank of experts, with 64 inputs and outputs or more, "
            "outside the head. "
            f"Leave `base` out. Received: base={base!r}, head={head}"
        )
    return dict.fromkeys([*kernels, *banks], base)


@contextlib.contextmanager
def packed(model: keras.Model, chosen: Mapping[str, str]) -> Iterator[None]:
    """Quantizes the layers of `{path: format}`, for good unless it fails.

    Within, the packed kernels know their `original`.
    """
    if not chosen:
        yield
        return
    layers = dict(layer_tree.walk(model))
    layer_tree.forget_parameters(model)
    done = []
    try:
        for path, base in chosen.items():
            _pack(layers[path], base)
            done.append(layers[path])
        yield
    except BaseException:
        for layer in done:
            _undo(layer)
        raise
    for layer in done:
        for kernel in layer_tree.packed_kernels(layer):
            kernel.original = None


def _pack(layer, base):
    if base in keras_quantized.MODES:
        keras_quantized.take(layer, base)
    elif packed_bank.can_pack(layer):
        packed_bank.pack(layer, FORMATS[base])
    else:
        packed_kernel.pack(layer, FORMATS[base])


def _undo(layer):
    if keras_quantized.is_taken(layer):
        keras_quantized.give_back(layer)
    else:
        packed_kernel.unpack(layer, original=True)


@contextlib.contextmanager
def quantized_taken(model: keras.Model) -> Iterator[None]:
    """Makes what Keras quantized a packed base, for good unless it fails."""
    with packed(model, keras_quantized.formats(model)):
        yield


def give_back(model: keras.Model) -> None:
    """Leaves what Keras quantized as Keras has it."""
    for _, layer in layer_tree.walk(model):
        if keras_quantized.is_taken(layer):
            keras_quantized.give_back(layer)


def unpack(model: keras.Model) -> dict[str, list[PackedKernel]]:
    """Gives every layer a plain kernel; `{path: packed}` is for `repack`."""
    found = {
        path: layer
        for path, layer in layer_tree.walk(model)
        if layer_tree.packed_kernels(layer)
    }
    if found:
        layer_tree.forget_parameters(model)
    return {path: packed_kernel.unpack(layer) for path, layer in found.items()}


def repack(
    model: keras.Model, packed: Mapping[str, list[PackedKernel]]
) -> None:
    """Undoes `unpack`."""
    if not packed:
        return
    layers = dict(layer_tree.walk(model))
    layer_tree.forget_parameters(model)
    for path, kernels in packed.items():
        packed_kernel.repack(layers[path], kernels)
