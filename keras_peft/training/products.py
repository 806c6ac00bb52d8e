"""How XLA computes the matrix products of a training step on a GPU."""

import functools

import keras

from keras_peft import layer_tree
from keras_peft.replacing import replaced

_WHY = "products by cuBLAS where adapters only add"
# XLA's own kernels leave each sum of a layer and its adapter to a kernel that
# reads both once more; cuBLAS adds to what is there as it writes.
_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def add_in_products(model: keras.Model) -> None:
    """Compiles the training step of `model` for JAX with `_OPTIONS`.

    DoRA multiplies each sum as well, which is a kernel of its own in any case:
    with such adapters XLA is left to choose. So it is where it does not know
    the option.
    """
    if not _is_known():
        return
    layer_tree.replace_method(model, "make_train_function", _make, _WHY)
    layer_tree.forget_compiled(model, optimizer=False)


def _is_known():
    import jax

    if keras.config.is_nnx_enabled():  # It has a compiler of its own.
        return False
    try:
        jax.jit(lambda: 0, compiler_options=_OPTIONS)()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _make(model, force=False):
    from keras.src.backend.jax import trainer

    is_dora = any(
        getattr(adapter, "decompose", False)
        for _, layer in layer_tree.adapted_layers(model)
        for adapter in layer.adapters.values()
    )
    options = {} if is_dora else _OPTIONS
    jit = functools.partial(trainer.jit, compiler_options=options)
    with replaced(trainer, jit=jit):
        layer_tree.method_of_class(model, "make_train_function")(force)
