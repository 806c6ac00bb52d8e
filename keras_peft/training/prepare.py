"""Everything that helps a model to train, in one call."""

import keras

from keras_peft import layer_tree
from keras_peft.blocks import find_blocks
from keras_peft.processes import is_data_parallel
from keras_peft.training.attention_forms import is_on_gpu
from keras_peft.training.capture import capture_steps
from keras_peft.training.capture import check_capture
from keras_peft.training.causal_attention import attentions_of
from keras_peft.training.causal_attention import causal_attention
from keras_peft.training.chunked_loss import checked_split
from keras_peft.training.chunked_loss import chunk_loss
from keras_peft.training.compiled_step import compile_step
from keras_peft.training.data_parallel import data_parallel
from keras_peft.training.gathering import gather_weights
from keras_peft.training.rematerialize import blocks_of
from keras_peft.training.rematerialize import rematerialize
from keras_peft.training.segments import replace_methods
from keras_peft.training.segments import separable_parts
from keras_peft.training.shared_inputs import read_inputs_once


def prepare(
    model: keras.Model,
    loss: str | None = "chunked",
    remat: str | None = None,
    attention: str | None = "auto",
    chunk_size: int = 1024,
    packing: bool = False,
    capture: bool = False,
) -> keras.Model:
    """Puts onto `model` what makes training faster and smaller, in place.

    Then `compile` and `fit` as ever. Nothing of it is in what is saved, be it
    the model or an adapter; adapters can be added, merged and removed before
    and after. `keras_peft.training.restore` undoes it, and a second call
    replaces the first. Adapters of layers that share inputs, such as query, key
    and value, read them once; of one dropout rate, they drop the same. Under
    `keras_peft.training.FullyShardedDataParallel`, layers also put their
    kernels together before they compute, so that no activations travel. On
    JAX, the step is compiled so that its state stays in its place, on a GPU
    with products by cuBLAS, which adds what adapters change as it writes, and
    once more without a look at masks for batches whose rows are all full.

    Args:
        model: A built model, adapted or not.
        loss: `"chunked"`: head and loss together, for language models
            (`keras_peft.training.chunk_loss`). `None`: as Keras does.
        remat: `"full"` or `"dots"`: blocks are computed again in the backward
            pass (`keras_peft.training.rematerialize`). `None`: activations
            are kept.
        attention: `"causal"`: by a kernel that needs no mask, on JAX
            (`keras_peft.training.causal_attention`). `None`: as Keras does.
            `"auto"`: `"causal"` on JAX with a GPU, if the model has
            transformer blocks, else `None`.
        chunk_size: Positive integer. Tokens whose logits exist at once.
        packing: Boolean. Whether the sequences of a row are kept apart, for
            the rows of `keras_peft.training.pack`
            (`keras_peft.training.separate_segments`).
        capture: Boolean. On torch with a GPU, steps are recorded as CUDA
            graphs (`keras_peft.training.capture_steps`): half of the time,
            for models without dropout.

    Returns:
        `model`.

    Raises:
        ValueError: if a part does not fit the model or the backend. The model
            is then as it was.

    Example:
    >>> keras_peft.training.prepare(causal_lm, remat="full")
    >>> causal_lm.compile("adam")
    >>> causal_lm.fit(inputs, targets)
    """
    if loss not in ("chunked", None):
        raise ValueError(
            "`loss` says how it is computed: 'chunked', or None for Keras' "
            "way. Which loss it is, `model.compile` is told. "
            f"Received: loss={loss!r}"
        )
    if attention not in ("auto", "causal", None):
        raise ValueError(
            "`attention` must be 'auto', 'causal' or None. "
            f"Received: attention={attention!r}"
        )
    is_jax = keras.config.backend() == "jax"
    if attention == "auto":
        layers = layer_tree.layers_by_path(model)
        is_faster = is_jax and is_on_gpu() and find_blocks(layers)
        attention = "causal" if is_faster else None
    # What cannot be put on is found before anything is taken off.
    if loss is not None:
        checked_split(model, chunk_size)
    if remat is not None:
        blocks_of(model, remat)
    if attention is not None:
        attentions_of(model)
    if capture:
        check_capture(model)
    parts = separable_parts(model) if packing else None
    is_parallel = is_data_parallel(model)
    restore(model)
    gather_weights(model)
    read_inputs_once(model)
    if is_jax:
        compile_step(model, is_causal=attention == "causal")
    if is_parallel:
        data_parallel(model)
    if parts is not None:
        replace_methods(parts)
    if attention is not None:
        causal_attention(model)
    if remat is not None:
        rematerialize(model, remat)
    if loss is not None:
        chunk_loss(model, chunk_size)
    if capture:
        capture_steps(model)
    return model


def restore(model: keras.Model) -> keras.Model:
    """Undoes what `keras_peft.training` put onto `model`, in place.

    Weights, adapters, optimizer and what `compile` was told stay as they are.
    A model on which nothing was put stays as it is.

    Returns:
        `model`.
    """
    layers = layer_tree.layers_by_path(model).values()
    if [name for la in layers for name in layer_tree.restore_methods(la)]:
        layer_tree.forget_compiled(model, optimizer=False)
    return model
