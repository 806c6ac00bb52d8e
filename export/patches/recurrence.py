"""Recurrent layers as a loop over plain tensors.

Keras collects their outputs in a list of tensors, which the LiteRT converter
takes for fixed batch sizes only.
"""

from contextlib import AbstractContextManager
from typing import Any

from keras_peft.replacing import replaced


def patched() -> AbstractContextManager[None]:
    """Replaces the loop of Keras' TensorFlow backend."""
    from keras.src import backend

    real = backend.rnn

    def rnn(*args: Any, unroll: bool = False, **options: Any) -> Any:
        if unroll:
            return real(*args, unroll=True, **options)
        return _rnn(*args, **options)

    return replaced(backend, rnn=rnn)


def _rnn(
    step_function: Any,
    inputs: Any,
    initial_states: Any,
    go_backwards: bool = False,
    mask: Any = None,
    constants: Any = None,
    input_length: Any = None,
    time_major: bool = False,
    zero_output_for_mask: bool = False,
    return_all_outputs: bool = True,
) -> tuple[Any, Any, Any]:
    """See `keras.src.backend.tensorflow.rnn.rnn`."""
    import keras
    import tensorflow as tf

    def arranged(x: Any) -> Any:
        x = x if time_major else _swapped(x)
        return tf.reverse(x, [0]) if go_backwards else x

    mapped = keras.tree.map_structure
    inputs = mapped(arranged, inputs)
    if mask is not None:
        mask = arranged(tf.cast(mask, "bool"))
    count = tf.shape(keras.tree.flatten(inputs)[0])[0]
    constants = tuple(constants or ())

    def step(time: Any, states: Any) -> Any:
        now = mapped(lambda x: tf.gather(x, time), inputs)
        return step_function(now, (*states, *constants))

    def body(time: Any, outputs: Any, last: Any, states: Any) -> Any:
        output, new = step(time, states)
        if mask is not None:
            here = tf.gather(mask, time)
            passed = tf.zeros_like(last) if zero_output_for_mask else last
            output = tf.where(_shaped(here, output), output, passed)
            new = mapped(
                lambda n, old: tf.where(_shaped(here, n), n, old),
                tuple(new),
                tuple(states),
            )
        if return_all_outputs:
            outputs = _written(outputs, output, time)
        return time + 1, outputs, output, tuple(new)

    states = tuple(initial_states)
    first, _ = step(0, states)
    empty = tf.zeros_like(first)
    size = count if return_all_outputs else 1
    outputs = tf.zeros(tf.concat([[size], tf.shape(first)], 0), first.dtype)
    outputs.set_shape([None, *first.shape])
    _, outputs, last, states = tf.while_loop(
        lambda time, *_: time < count,
        body,
        (tf.constant(0), outputs, empty, states),
        shape_invariants=(
            tf.TensorShape([]),
            outputs.shape,
            first.shape,
            mapped(lambda s: s.shape, states),
        ),
    )
    if not return_all_outputs:
        outputs = tf.expand_dims(last, 0)
    return last, outputs if time_major else _swapped(outputs), states


def _swapped(x: Any) -> Any:
    """Time first for the batch first, and back."""
    import tensorflow as tf

    return tf.transpose(x, [1, 0, *range(2, x.shape.rank)])


def _shaped(mask: Any, like: Any) -> Any:
    """A number per row, against arrays of any rank."""
    import tensorflow as tf

    return tf.reshape(mask, [-1, *[1] * (like.shape.rank - 1)])


def _written(outputs: Any, output: Any, time: Any) -> Any:
    """`outputs` with one more row."""
    import keras
    import tensorflow as tf

    place = (time, *[0] * output.shape.rank)
    row = tf.expand_dims(output, 0)
    written = keras.ops.slice_update(outputs, place, row)
    return tf.ensure_shape(written, outputs.shape)
