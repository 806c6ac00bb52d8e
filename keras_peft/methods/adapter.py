"""What a method adds to one layer.

A method's adapter is a subclass of one of three:

- `KernelAdapter` changes a kernel, and says so twice, side by side: in the
  forward pass (`call`) and as a matrix (`kernel_delta`).
- `VariableAdapter` changes other weights, such as the scales of norms.
- `CallAdapter` stands around a layer's call. What it does is no change of
  weights, so it cannot be merged.
"""

import contextlib
import random

import keras
import numpy as np
from keras import ops

from keras_peft.kernels import kernel_of


class Adapter(keras.Layer):
    """Weights of one adapter at one layer.

    `strength` multiplies the adapter's effect: 1 when it is active, 0 when it
    is not. It is a variable, so that switching adapters compiles nothing anew.
    """

    # Whether the effect can be folded into the layer's own weights.
    mergeable = True
    # Whether activity changes the program, such as the length of a sequence:
    # then `strength` is not enough, and switching compiles anew.
    structural = False
    # Whether it acts as a whole or not at all, and beside no other such.
    exclusive = False
    # A class to be mixed into the layer's, where its `call` is not all.
    mixin: type | None = None
    # Whether what happens to a token depends on its position in the row.
    counts_positions = False
    # How many of a text model's positions it takes while it is present.
    positions = 0
    # A factor on the effect for each row of a batch, or `None`.
    rows = None

    def __init__(self, layer, shapes, name):
        # Inputs come in the layer's compute dtype already; adapters are kept
        # in float32, where small steps are not rounded away.
        super().__init__(name=name, dtype="float32", autocast=False)
        self.present = False
        with contextlib.ExitStack() as scopes:
            for part in (*(layer.path or layer.name).split("/"), name):
                scopes.enter_context(keras.name_scope(part))
            self.strength = self.weight("strength", (), trainable=False)
            self.build_weights(shapes)
        self.kept = list(shapes)
        self.learned = [v for v in self.weights if v.trainable]
        self.built = True

    def build_weights(self, shapes):
        """Creates the weights of an adapter file, and any others."""
        for key, shape in shapes.items():
            setattr(self, key, self.weight(key, shape))

    def weight(self, name, shape, trainable=True, autocast=True, **kwargs):
        return self.add_weight(
            name=name,
            shape=shape,
            initializer="zeros",
            trainable=trainable,
            autocast=autocast,
            **kwargs,
        )

    @property
    def parameters(self):
        """`{name: variable}` of what an adapter file keeps."""
        return {name: getattr(self, name) for name in self.kept}

    def start(self, observed=None):
        """Sets the start values, drawn by NumPy: equal on every backend.

        `observed` is the layer's `LayerInputs`, if its method is `calibrated`.
        """
        self.observed = observed
        # Python's generator is one that `keras.utils.set_random_seed` seeds.
        seed = random.randint(0, 2**31 - 1)
        self.read_base()
        self.initialize(np.random.default_rng(seed))
        self.observed = None
        self.strength.assign(1.0)

    def read_base(self):
        """Keeps what the adapter needs to know of the base."""

    def initialize(self, rng):
        """Sets the start values; weights are zero before."""

    def deltas(self):
        """`[(variable, change)]` of the layer's weights, strength included.

        Changes are float32 arrays in the variable's own shape.
        """
        raise NotImplementedError


class KernelAdapter(Adapter):
    """Adapter of one layer's kernel."""

    # Whether `call(inputs)` returns a change of the layer's inputs, as for a
    # rotation of them. Else `call(inputs, outputs, reverse, training)` returns
    # a change of its outputs, before the activation.
    on_inputs = False

    def __init__(self, layer, shapes, name):
        self.kernel = kernel_of(layer)
        super().__init__(layer, shapes, name)

    def scaling(self):
        """`(gain, more)` of one that scales all that its layer computes.

        Asked where no other adapter is at the layer. That then computes
        `scaled(outputs + low_rank(inputs, dtype, gain=gain), more)`, in place
        of a sum with a change: one pass over the outputs instead of two.
        """

    def kernel_delta(self, kernel):
        """The change of the `[inputs, outputs]` kernel, strength included."""
        raise NotImplementedError

    def bias_delta(self, bias):
        """The same of the `[outputs]` bias; `None` leaves it as it is."""

    def deltas(self):
        view = self.kernel
        change = self.kernel_delta(view.read()).astype("float32")
        found = [(view.variable, view.from_matrix(change))]
        if view.bias is not None:
            change = self.bias_delta(view.read_bias())
            if change is not None:
                found.append((view.bias, change.reshape(view.bias.shape)))
        return found


class VariableAdapter(Adapter):
    """Adds to some of a layer's own variables.

    While the layer is called, each of them stands for its sum with the
    adapter's weight of the same shape.
    """

    def __init__(self, layer, variables, name, shapes=None):
        """`variables`: `{weight: variable of the layer}`.

        `shapes` are those of the adapter's weights, where they are others.
        """
        # Not tracked: they are the layer's variables, and not the adapter's.
        object.__setattr__(self, "changed", list(variables.values()))
        if shapes is None:
            shapes = {key: v.shape for key, v in variables.items()}
        super().__init__(layer, shapes, name)

    def additions(self):
        """`[(variable, what is added to it)]`, for the forward pass."""
        changes = self.parameters.values()
        return [
            (variable, ops.multiply(change, self.strength))
            for variable, change in zip(self.changed, changes, strict=True)
        ]

    def deltas(self):
        convert = ops.convert_to_numpy
        return [(v, convert(change)) for v, change in self.additions()]


class CallAdapter(Adapter):
    """Stands around the call of a layer, whatever its arguments."""

    mergeable = False

    def around(self, call, *args, **kwargs):
        """What the layer returns instead of `call(*args, **kwargs)`."""
        raise NotImplementedError
