"""What every adapter of a kernel has in common."""

import contextlib
import random

import keras
import numpy as np

from keras_peft.kernels import kernel_of


class KernelAdapter(keras.Layer):
    """Adapter of one layer's kernel.

    A subclass creates its weights in `build_weights`, gives the change of the
    layer's outputs in `call`, and the same change of the kernel in
    `kernel_delta`; the two are one formula, read side by side.

    `strength` multiplies the change: 1 when the adapter is active, 0 when it is
    not. It is a variable, so that switching adapters compiles nothing anew.
    """

    def __init__(self, method, path, layer, name):
        # Inputs come in the layer's compute dtype already; adapters are kept
        # in float32, where small steps are not rounded away.
        super().__init__(name=name, dtype="float32", autocast=False)
        self.kernel = kernel_of(layer)
        shapes = method.shapes(path, self.kernel)
        with contextlib.ExitStack() as scopes:
            for part in (*layer.path.split("/"), name):
                scopes.enter_context(keras.name_scope(part))
            self.strength = self.weight("strength", (), trainable=False)
            self.build_weights(shapes)
        self.kept = list(shapes)
        self.learned = [v for v in self.weights if v.trainable]
        self.built = True

    def weight(self, name, shape, trainable=True, autocast=True):
        return self.add_weight(
            name=name,
            shape=shape,
            initializer="zeros",
            trainable=trainable,
            autocast=autocast,
        )

    @property
    def parameters(self):
        """`{name: variable}` of what an adapter file keeps."""
        return {name: getattr(self, name) for name in self.kept}

    def start(self):
        """Sets the start values, drawn by NumPy: equal on every backend."""
        # Python's generator is one that `keras.utils.set_random_seed` seeds.
        seed = random.randint(0, 2**31 - 1)
        self.read_base()
        self.initialize(self.kernel.read(), np.random.default_rng(seed))
        self.strength.assign(1.0)

    def read_base(self):
        """Keeps what the adapter needs to know of the base kernel."""

    def build_weights(self, shapes):
        raise NotImplementedError

    def initialize(self, kernel, rng):
        """Sets the start values, given the `[inputs, outputs]` kernel."""
        raise NotImplementedError

    def kernel_delta(self, kernel):
        """The change of the `[inputs, outputs]` kernel, strength included."""
        raise NotImplementedError
