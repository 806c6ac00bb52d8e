"""Dropout of an adapter's inputs, as cheap as reading them."""

import keras
import numpy as np


class Dropout(keras.layers.Dropout):
    """Keras' dropout, in the dtype of its inputs.

    Keras draws with JAX's Threefry, some hundred operations for each number:
    on a GPU that takes longer than the memory does, and adapters drop the
    inputs of every layer. Here, on JAX, it is two rounds of a mixing function
    whose outputs change in half of their bits when one bit of the input does:

        u = mix(mix(place ^ seed[0]) + seed[1])

    - [Wellons, 2018](https://nullprogram.com/blog/2018/07/31/): `lowbias32`.
    """

    def __init__(self, rate, **kwargs):
        super().__init__(rate, autocast=False, **kwargs)

    def call(self, inputs, training=False):
        if keras.config.backend() != "jax" or not training or not self.rate:
            return super().call(inputs, training)
        import jax
        import jax.numpy as jnp

        seed, step = self.seed_generator.next()
        places = jax.lax.iota("uint32", inputs.size).reshape(inputs.shape)
        drawn = _mix(_mix(places ^ seed) + step)
        is_kept = drawn >= np.uint32(self.rate * 2**32)
        return jnp.where(is_kept, inputs / (1.0 - self.rate), 0)


def _mix(x):
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
