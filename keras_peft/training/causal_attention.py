"""Causal attention by a kernel that needs no mask."""

import keras

from keras_peft import layer_tree
from keras_peft.replacing import replaced
from keras_peft.training.attention_forms import attend
from keras_peft.training.attention_forms import is_on_gpu
from keras_peft.training.attention_forms import may_be_causal
from keras_peft.training.model_blocks import layers_and_blocks


def causal_attention(model: keras.Model) -> keras.Model:
    """Lets attention skip what a causal mask forbids, in place.

    Keras hands a mask of `length * length` entries to the attention of every
    block, so that the kernel computes all scores and reads a bias beside them,
    and it repeats keys and values that several heads share. Here the kernel is
    told that attention is causal, and how long each row is. That is the same
    function wherever a mask is causal and pads the ends of rows, if any. The
    program looks at each mask while it runs: with others, such as padding in
    front, it computes what Keras computes.

    It is for JAX, and pays on a GPU in float16 or bfloat16, where cuDNN has
    the kernel; elsewhere XLA computes the same. It acts in training alone. What
    is saved knows nothing of it, and `keras_peft.training.restore` undoes it.

    - [Dao, 2023](https://arxiv.org/abs/2307.08691)

    Args:
        model: A built model with transformer blocks whose attention is
            `keras.ops.dot_product_attention`, as in keras-hub.

    Returns:
        `model`.

    Raises:
        ValueError: if the backend is not JAX, or the model has no transformer
            blocks.

    Example:
    >>> keras_peft.training.causal_attention(causal_lm)
    >>> causal_lm.fit(inputs, targets)
    """
    kernel = "cuDNN's kernel for half precision" if is_on_gpu() else "XLA"
    why = f"causal attention without a mask, by {kernel}"
    for layer in attentions_of(model):
        layer_tree.replace_method(layer, "call", _call, why)
    layer_tree.forget_compiled(model, optimizer=False)
    return model


def attentions_of(model: keras.Model) -> list[keras.Layer]:
    """The layers in which blocks of `model` attend, if JAX computes them."""
    if keras.config.backend() != "jax":
        raise ValueError(
            "Only JAX can choose the kernel of an attention while a program "
            "runs. Leave attention as it is on other backends. "
            f"Received: backend {keras.config.backend()!r}"
        )
    layers, blocks = layers_and_blocks(model)
    return [layers[a.path] for block in blocks for a in block.attention]


def _call(layer, *args, **kwargs):
    original = layer_tree.method_of_class(layer, "call")
    if not layer_tree.is_training(layer):
        return original(*args, **kwargs)
    heads = _SharedHeads()
    ours = dict(
        repeat=heads.repeat,
        dot_product_attention=_attention(heads),
        stack=_stack,
    )
    # keras-hub finds operations in the one, layers of Keras in the other.
    with replaced(keras.ops, **ours), replaced(keras.src.ops, **ours):
        return original(*args, **kwargs)


def _stack(x, axis=0):
    """`keras.ops.stack`, in half of the time where rotary embeddings do it.

    XLA joins arrays on the last axis faster than on a new one before it.
    """
    shapes = {array.shape for array in x}
    if axis != -2 or len(shapes) > 1:
        return keras.src.ops.numpy.stack(x, axis)
    (shape,) = shapes
    joined = keras.ops.concatenate(x, axis=-1)
    return keras.ops.reshape(joined, (*shape[:-1], len(x), shape[-1]))


class _SharedHeads:
    """Remembers what keys and values were before each head got its own."""

    def __init__(self):
        self.repeat_of_keras = keras.ops.repeat
        self.found = {}

    def repeat(self, x, repeats, axis=None):
        repeated = self.repeat_of_keras(x, repeats, axis)
        if len(x.shape) == 4 and axis == 2 and isinstance(repeats, int):
            # With the array itself, or its number may be given away.
            self.found[id(repeated)] = repeated, x
        return repeated

    def shared(self, x):
        return self.found.get(id(x), (x, x))[1]


def _attention(heads):
    of_keras = keras.ops.dot_product_attention

    def attention(query, key, value, bias=None, mask=None, scale=None, **rest):
        usual = not any(v is not None and v is not False for v in rest.values())
        if bias is not None or not usual or not may_be_causal(query, key, mask):
            return of_keras(query, key, value, bias, mask, scale, **rest)
        key, value = heads.shared(key), heads.shared(value)
        return attend(query, key, value, mask, scale)

    return attention
