"""Delta rules over texts of any length: those of RWKV7 and Qwen3.5.

keras-hub writes their steps over time as a Python loop, or over a number of
whole chunks, for which the length must be known.
"""

import contextlib
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

from keras_peft.replacing import replaced

# More steps than any text has.
_FOREVER = 2**31 - 1


def _scan(step: Callable[..., Any], state: Any, *sequences: Any) -> Any:
    """`(last state, outputs)` of steps over the second axis of sequences.

    The loop is that of Keras' recurrent layers, which ends with the sequences;
    it cannot read their length off a nest of them.
    """
    from keras.src import backend

    def turn(now: Any, states: Any) -> Any:
        state, output = step(states[0], *now)
        return output, [state]

    _, outputs, (state,) = backend.rnn(
        turn, sequences, [state], input_length=_FOREVER
    )
    return state, outputs


def _rwkv_step(
    state: Any, r: Any, w: Any, k: Any, v: Any, a: Any, b: Any
) -> tuple[Any, Any]:
    import tensorflow as tf

    read = tf.einsum("bhij,bhj->bhi", state, a)
    state = state * tf.exp(-tf.exp(w))[:, :, None]
    state += tf.einsum("bhi,bhj->bhij", read, b)
    state += tf.einsum("bhi,bhj->bhij", v, k)
    return state, tf.einsum("bhij,bhj->bhi", state, r)


def _rwkv(
    r: Any,
    w: Any,
    k: Any,
    v: Any,
    a: Any,
    b: Any,
    initial_state: Any = None,
    **options: Any,
) -> Any:
    import tensorflow as tf

    sequences = [tf.cast(x, "float32") for x in (r, w, k, v, a, b)]
    size = r.shape[-1]
    state = tf.zeros_like(sequences[0][:, 0, :, :, None])
    state = tf.tile(state, (1, 1, 1, size))
    if initial_state is not None:
        state += initial_state
    state, outputs = _scan(_rwkv_step, state, *sequences)
    return tf.cast(outputs, r.dtype), state


def _gated_step(state: Any, q: Any, k: Any, v: Any, g: Any, beta: Any) -> Any:
    import tensorflow as tf

    state = state * tf.exp(g)[..., None, None]
    change = v - tf.einsum("bhij,bhi->bhj", state, k)
    change *= beta[..., None]
    state += tf.einsum("bhi,bhj->bhij", k, change)
    return state, tf.einsum("bhij,bhi->bhj", state, q)


def _gated(
    query: Any,
    key: Any,
    value: Any,
    g: Any,
    beta: Any,
    initial_state: Any = None,
    **options: Any,
) -> Any:
    import tensorflow as tf
    from keras_hub.src.models.qwen3_5 import qwen3_5_gated_delta_net as module

    query, key = module._l2norm(query), module._l2norm(key)
    query *= query.shape[-1] ** -0.5
    sequences = [tf.cast(x, "float32") for x in (query, key, value, g, beta)]
    state = tf.zeros_like(
        sequences[1][:, 0, :, :, None] * sequences[2][:, 0, :, None]
    )
    if initial_state is not None:
        state += initial_state
    state, outputs = _scan(_gated_step, state, *sequences)
    return tf.cast(outputs, query.dtype), state


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Takes every step in one loop, whose length the runtime knows."""
    try:
        from keras_hub.src.models.qwen3_5 import qwen3_5_gated_delta_net
        from keras_hub.src.models.rwkv7.rwkv7_layer import RWKV7TimeMix
    except ImportError:
        yield
        return
    # Every layer keeps the rule that it was made with; a property of its
    # class comes first.
    names = ("RWKV7_OP", "RWKV7_OP_INFERENCE")
    for name in names:
        setattr(RWKV7TimeMix, name, property(lambda layer: _rwkv))
    try:
        with replaced(qwen3_5_gated_delta_net, _chunk_gated_delta_rule=_gated):
            yield
    finally:
        for name in names:
            delattr(RWKV7TimeMix, name)
