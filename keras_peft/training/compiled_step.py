"""How JAX compiles a training step."""

import functools

import keras

from keras_peft import layer_tree
from keras_peft.replacing import replaced
from keras_peft.training.attention_forms import first_masks_full
from keras_peft.training.attention_forms import is_on_gpu
from keras_peft.training.full_masks import FullMasks
from keras_peft.training.full_masks import may_know_masks

# XLA's own kernels leave each sum of a layer and its adapter to a kernel that
# reads both once more; cuBLAS adds to what is there as it writes.
_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def compile_step(model: keras.Model, is_causal: bool = False) -> None:
    """Compiles the training step of `model`, on JAX, so that it copies less.

    What a step is given and returns keeps its place in memory. On a GPU,
    products are cuBLAS', which adds what adapters change as it writes, where
    XLA knows the option.

    `is_causal`: attention looks at its masks while a step runs. For batches
    whose rows are all full a step is compiled that need not.
    """
    if keras.config.is_nnx_enabled():  # It has a compiler of its own.
        return
    options = _OPTIONS if is_on_gpu() and _is_known() else {}
    why = "steps that leave their state in its place"
    if options:
        why = f"{why}; products by cuBLAS"
    is_told = is_causal and may_know_masks(model)
    if is_told:
        why = f"{why}; one that looks at no mask where rows are full"
    make = functools.partial(_make, options, is_told)
    layer_tree.replace_method(model, "make_train_function", make, why)
    layer_tree.forget_compiled(model, optimizer=False)


def _is_known():
    import jax

    try:
        jax.jit(lambda: 0, compiler_options=_OPTIONS)()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _make(options, is_told, model, force=False):
    from keras.src.backend.jax import trainer

    jit_of_keras = trainer.jit

    def jit(step, **settings):  # Called where Keras has no step yet.
        chosen_jit = functools.partial(jit_of_keras, compiler_options=options)
        compiled = functools.partial(_in_place, chosen_jit, step, **settings)
        if not is_told:
            return compiled()
        return _by_masks(FullMasks(model), compiled(), compiled())

    with replaced(trainer, jit=jit):
        layer_tree.method_of_class(model, "make_train_function")(force)


def _in_place(jit, step, out_shardings=None, **settings):
    """`jit` of a step that returns `(logs, state)`, compiled the other way.

    JAX hands the memory of a step's arguments to what it returns, in order,
    where shapes agree. Behind the logs, each scalar of the state would get the
    memory of the one before, and be copied there by a kernel of its own.
    """

    def state_first(*args):
        logs, state = step(*args)
        return state, logs

    if out_shardings is not None:
        out_shardings = out_shardings[::-1]
    compiled = jit(state_first, out_shardings=out_shardings, **settings)

    def logs_first(*args):
        state, logs = compiled(*args)
        return logs, state

    return logs_first


def _by_masks(masks, looking, told):
    """One of two steps: that which looks at masks, or that which is told."""

    def step(state, data):
        count = masks.count(state, data)
        with first_masks_full(count):
            return (told if count else looking)(state, data)

    return step
