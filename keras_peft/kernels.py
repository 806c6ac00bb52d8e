"""The kernel of a layer, seen as one `[inputs, outputs]` matrix.

A method in `keras_peft.methods` speaks of a matrix only. Each class below says
for one kind of layer how that matrix lies in the layer's own kernel, how to
apply a product of two thin matrices to the layer's inputs without forming it,
and where the outputs' channels are.
"""

import math

import keras
from keras import ops


def read(variable):
    """A variable of any dtype as a float32 NumPy array."""
    return ops.convert_to_numpy(ops.cast(variable, "float32"))


def is_packed(value):
    """Whether it is a variable in 4 or 8 bits, computed from its `parts`."""
    return isinstance(value, keras.Variable) and hasattr(value, "parts")


class DenseKernel:
    """`Dense`: the kernel is the matrix."""

    def __init__(self, layer):
        self.layer = layer
        self.inputs, self.outputs = self.variable.shape

    @property
    def variable(self):
        return self.layer.kernel

    @property
    def bias(self):
        return self.layer.bias

    def matrix(self):
        """The kernel as a tensor of shape `(inputs, outputs)`."""
        return self.as_matrix(self.variable)

    def as_matrix(self, kernel):
        """The same of a tensor in the kernel's own shape."""
        return ops.reshape(kernel, (self.inputs, self.outputs))

    @property
    def is_packed(self):
        """Whether the kernel is in 4 or 8 bits."""
        return is_packed(self.variable)

    def times(self, rows):
        """`rows @ matrix`, in the dtype of `rows`."""
        if self.is_packed:
            return self.variable.multiply(rows)
        return ops.matmul(rows, ops.cast(self.matrix(), rows.dtype))

    def reader(self, dtype):
        """`(parts, function)`, for products with gradients of their own.

        `function(parts, tensor)` is the matrix, not had before `tensor` is if
        it has to be computed from the parts.
        """
        if self.is_packed:
            return self.variable.reader(dtype)
        return [ops.cast(self.matrix(), dtype)], lambda parts, _: parts[0]

    def read(self):
        """The kernel as a float32 NumPy array of that shape."""
        return self.to_matrix(read(self.variable))

    def read_original(self):
        """The same of the kernel as it was before it was packed."""
        return self.to_matrix(read(self.variable.original))

    def read_bias(self):
        """The bias as a float32 NumPy array of shape `(outputs,)`."""
        return read(self.bias).reshape(self.outputs)

    def to_matrix(self, kernel):
        """The same of a NumPy array in the kernel's own shape."""
        return kernel.reshape(self.inputs, self.outputs)

    def from_matrix(self, matrix):
        return matrix.reshape(self.variable.shape)

    def split_axes(self, axes):
        """`(of the inputs, of the outputs)` of one entry per kernel axis.

        An entry is the name of an axis of a device mesh, or `None`.
        """
        return _leading(axes[:-1]), axes[-1]

    @property
    def reads(self):
        """`(axes of inputs that are summed, their sizes)`, in the row order."""
        return (-1,), (self.inputs,)

    def down(self, inputs, a):
        """`inputs @ a`, for `a` of shape `(inputs, rank)`."""
        return _matmul(inputs, a)

    def up(self, hidden, b):
        """`hidden @ b` in the layer's output shape, `b` `(rank, outputs)`."""
        return _matmul(hidden, b)

    def low_rank(self, inputs, a, b):
        """`inputs @ a @ b`: the product `a @ b` is never formed."""
        return self.up(self.down(inputs, a), b)

    def product(self, inputs, kernel):
        """What the layer computes, bias aside, with `kernel` for its own."""
        return _matmul(inputs, kernel)

    def as_kernel(self, matrix):
        """A tensor of shape `(inputs, outputs)` in the kernel's own shape."""
        return ops.reshape(matrix, self.variable.shape)

    def rows(self, inputs):
        """The inputs, the rows' channels as one last axis."""
        return inputs

    def from_rows(self, rows):
        """The outputs, of which `rows` has the columns' as one last axis."""
        return rows

    def units(self, dtype):
        """Inputs of which the layer makes its kernel: each a unit vector.

        The last one is zero, of which it makes the bias alone.
        """
        rows = ops.eye(self.inputs + 1, self.inputs, dtype=dtype)
        return self.spread(rows)

    def spread(self, rows):
        """`(count, inputs)` as inputs with one axis of tokens."""
        return rows

    def from_unit_outputs(self, outputs):
        """The kernel, in its own shape, from what the units became."""
        rows = self.gather(outputs)
        return self.as_kernel(ops.subtract(rows[:-1], rows[-1:]))

    def gather(self, outputs):
        """Outputs with one axis of tokens, as `(count, outputs)`."""
        return outputs

    @property
    def rows_are_inputs(self):
        """Whether each row of the matrix is one channel of the inputs.

        Then a change of the rows is one of the inputs: see `map_inputs`.
        """
        return True

    @property
    def columns_share_inputs(self):
        """Whether all outputs see the same inputs, so that columns can mix."""
        return True

    def map_inputs(self, inputs, function):
        """`function` of the inputs, while the rows' channels lie last."""
        return function(inputs)

    def map_outputs(self, outputs, function):
        """`function` of the outputs, while the columns' channels lie last."""
        return function(outputs)

    def scale_outputs(self, outputs, factor):
        """Multiplies each output channel by its entry of `factor`."""
        return ops.multiply(outputs, factor)

    def bias_objection(self):
        """Why the bias is not one entry per column, or `None` if it is."""

    def without_bias(self, outputs):
        if self.bias is None:
            return outputs
        return ops.subtract(outputs, ops.cast(self.bias, outputs.dtype))


def _leading(axes):
    """The entry of several axes that become one.

    Parts of an axis behind the first do not stay together.
    """
    return None if any(axes[1:]) else axes[0]


def _matmul(inputs, matrix):
    """`inputs @ matrix`, with all tokens on one axis.

    With several, XLA transposes a copy of the outputs' gradient, as large as
    the outputs, to get the gradient of `matrix`. Torch does not, and there
    views would keep it from adding gradients in place.
    """
    *tokens, size = ops.shape(inputs)
    if len(tokens) == 1 or keras.backend.backend() == "torch":
        return ops.matmul(inputs, matrix)
    outputs = ops.matmul(ops.reshape(inputs, (-1, size)), matrix)
    return ops.reshape(outputs, (*tokens, matrix.shape[1]))


class EinsumKernel(DenseKernel):
    """`EinsumDense`: contracted axes are the inputs, new axes the outputs.

    The roles come from the equation, never from the position: Gemma's query
    kernel `btd,ndh->btnh` is `[heads, inputs, head_dim]`.
    """

    def __init__(self, layer):
        self.layer = layer
        left, self.out = layer.equation.replace(" ", "").split("->")
        self.into, weight = left.split(",")
        sizes = dict(zip(weight, layer.kernel.shape, strict=True))
        self.contracted = [c for c in weight if c not in self.out]
        self.free = [c for c in weight if c not in self.into]
        if sorted(self.contracted + self.free) != sorted(weight):
            raise TypeError(
                f"The kernel of {layer.name!r} holds one matrix per entry of a "
                "shared axis, which is not one `[inputs, outputs]` matrix. "
                f"Received: equation={layer.equation!r}"
            )
        self.contracted_shape = tuple(sizes[c] for c in self.contracted)
        self.free_shape = tuple(sizes[c] for c in self.free)
        self.inputs = math.prod(self.contracted_shape)
        self.outputs = math.prod(self.free_shape)
        self.to_axes = [weight.index(c) for c in self.contracted + self.free]
        self.from_axes = [self.to_axes.index(i) for i in range(len(weight))]
        self.rank_letter = next(
            c for c in "rzyxwvuts" if c not in self.into + weight + self.out
        )

    def as_matrix(self, kernel):
        kernel = ops.transpose(kernel, self.to_axes)
        return ops.reshape(kernel, (self.inputs, self.outputs))

    def to_matrix(self, kernel):
        return kernel.transpose(self.to_axes).reshape(self.inputs, self.outputs)

    def from_matrix(self, matrix):
        shape = self.contracted_shape + self.free_shape
        return matrix.reshape(shape).transpose(self.from_axes)

    def split_axes(self, axes):
        axes = [axes[i] for i in self.to_axes]
        count = len(self.contracted)
        return _leading(axes[:count]), _leading(axes[count:])

    @property
    def reads(self):
        axes = [self.into.index(c) - len(self.into) for c in self.contracted]
        return tuple(axes), self.contracted_shape

    def down(self, inputs, a):
        a = ops.reshape(a, (*self.contracted_shape, -1))
        kept = "".join(c for c in self.into if c not in self.contracted)
        weight = "".join(self.contracted) + self.rank_letter
        return ops.einsum(
            f"{self.into},{weight}->{kept}{self.rank_letter}", inputs, a
        )

    def up(self, hidden, b):
        b = ops.reshape(b, (-1, *self.free_shape))
        kept = "".join(c for c in self.into if c not in self.contracted)
        weight = self.rank_letter + "".join(self.free)
        return ops.einsum(
            f"{kept}{self.rank_letter},{weight}->{self.out}", hidden, b
        )

    def product(self, inputs, kernel):
        return ops.einsum(self.layer.equation, inputs, kernel)

    def as_kernel(self, matrix):
        shape = self.contracted_shape + self.free_shape
        return ops.transpose(ops.reshape(matrix, shape), self.from_axes)

    def rows(self, inputs):
        kept = "".join(c for c in self.into if c not in self.contracted)
        order = kept + "".join(self.contracted)
        if order != self.into:
            inputs = ops.einsum(f"{self.into}->{order}", inputs)
        shape = ops.shape(inputs)[: -len(self.contracted)]
        return ops.reshape(inputs, (*shape, self.inputs))

    def from_rows(self, rows):
        kept = "".join(c for c in self.into if c not in self.contracted)
        order = kept + "".join(self.free)
        shape = (*ops.shape(rows)[:-1], *self.free_shape)
        outputs = ops.reshape(rows, shape)
        if order == self.out:
            return outputs
        return ops.einsum(f"{order}->{self.out}", outputs)

    def spread(self, rows):
        kept = "".join(c for c in self.into if c not in self.contracted)
        others = len(kept.replace("...", ".")) - 1
        shape = (self.inputs + 1, *others * (1,), *self.contracted_shape)
        order = kept + "".join(self.contracted)
        return ops.einsum(f"{order}->{self.into}", ops.reshape(rows, shape))

    def gather(self, outputs):
        kept = "".join(c for c in self.into if c not in self.contracted)
        order = kept + "".join(self.free)
        rows = ops.einsum(f"{self.out}->{order}", outputs)
        return ops.reshape(rows, (self.inputs + 1, self.outputs))

    def map_inputs(self, inputs, function):
        return _map_last(inputs, self.into, self.contracted, function)

    def map_outputs(self, outputs, function):
        return _map_last(outputs, self.out, self.free, function)

    def scale_outputs(self, outputs, factor):
        factor = ops.reshape(factor, self.free_shape)
        free = "".join(self.free)
        if self.out.endswith(free):
            return ops.multiply(outputs, factor)
        return ops.einsum(f"{self.out},{free}->{self.out}", outputs, factor)

    def bias_objection(self):
        axes = self.layer.bias_axes
        if axes and [c for c in self.out if c in axes] != self.free:
            return (
                f"its bias lies along the axes {axes!r} of "
                f"{self.layer.equation!r}, and not along {''.join(self.free)!r}"
            )
        return None


def _map_last(x, axes, last, function):
    """`function` of `x`, its axes `last` as one and at the end."""
    order = "".join(c for c in axes if c not in last) + "".join(last)
    moved = x if order == axes else ops.einsum(f"{axes}->{order}", x)
    shape = ops.shape(moved)
    moved = ops.reshape(moved, (*shape[: len(shape) - len(last)], -1))
    moved = ops.reshape(function(moved), shape)
    return moved if order == axes else ops.einsum(f"{order}->{axes}", moved)


class ConvKernel(DenseKernel):
    """`Conv1D/2D/3D`: a row is one tap of one input channel.

    With groups, `a` is shared by the groups: the matrix is
    `[taps * channels / groups, filters]`, as the kernel is stored.
    """

    def __init__(self, layer):
        self.layer = layer
        *self.taps, self.outputs = layer.kernel.shape
        self.inputs = math.prod(self.taps)
        self.channels_last = layer.data_format == "channels_last"

    @property
    def window(self):
        """How many taps each channel of the inputs has."""
        return math.prod(self.layer.kernel_size)

    def down(self, inputs, a):
        a = ops.reshape(a, (*self.taps, -1))
        if self.layer.groups > 1:
            a = ops.concatenate([a] * self.layer.groups, axis=-1)
        hidden = self.product(inputs, a)
        return hidden if self.channels_last else ops.moveaxis(hidden, 1, -1)

    def product(self, inputs, kernel):
        layer, padding = self.layer, self.layer.padding
        if padding == "causal":
            past = layer.dilation_rate[0] * (layer.kernel_size[0] - 1)
            steps = 1 if self.channels_last else 2
            pad = [(past, 0) if axis == steps else (0, 0) for axis in range(3)]
            inputs = ops.pad(inputs, pad)
            padding = "valid"
        return ops.conv(
            inputs,
            kernel,
            strides=list(layer.strides),
            padding=padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )

    @property
    def rows_are_inputs(self):
        return math.prod(self.taps[:-1]) == self.layer.groups == 1

    @property
    def columns_share_inputs(self):
        return self.layer.groups == 1

    def map_inputs(self, inputs, function):
        return self._map_channels(inputs, function)

    def map_outputs(self, outputs, function):
        return self._map_channels(outputs, function)

    def _map_channels(self, x, function):
        if self.channels_last:
            return function(x)
        return ops.moveaxis(function(ops.moveaxis(x, 1, -1)), -1, 1)

    def up(self, hidden, b):
        groups = self.layer.groups
        if groups > 1:
            rank, width = b.shape[0], self.outputs // groups
            shape = ops.shape(hidden)
            hidden = ops.reshape(hidden, (*shape[:-1], groups, rank))
            b = ops.reshape(b, (rank, groups, width))
            outputs = ops.einsum("...gr,rgw->...gw", hidden, b)
            outputs = ops.reshape(outputs, (*shape[:-1], self.outputs))
        else:
            outputs = ops.matmul(hidden, b)
        return outputs if self.channels_last else ops.moveaxis(outputs, -1, 1)

    def scale_outputs(self, outputs, factor):
        return ops.multiply(outputs, self._channels(factor, outputs))

    def without_bias(self, outputs):
        if self.bias is None:
            return outputs
        bias = ops.cast(self.bias, outputs.dtype)
        return ops.subtract(outputs, self._channels(bias, outputs))

    def _channels(self, vector, outputs):
        if self.channels_last:
            return vector
        return ops.reshape(vector, (1, -1) + (1,) * (len(outputs.shape) - 2))


class DepthwiseKernel(ConvKernel):
    """`DepthwiseConv1D/2D`: `[taps, channels * depth_multiplier]`.

    `a` holds `rank` spatial filters, `b` how each channel mixes them. The
    filters are mixed before they are applied: a depthwise kernel is smaller
    than one pixel's activations times its taps, whereas applying `rank` shared
    filters to every channel would multiply the activations by `rank`.
    """

    def __init__(self, layer):
        self.layer = layer
        self.channels_last = layer.data_format == "channels_last"
        *self.taps, channels, multiplier = layer.kernel.shape
        self.inputs = math.prod(self.taps)
        self.outputs = channels * multiplier

    @property
    def rows_are_inputs(self):
        return False

    @property
    def columns_share_inputs(self):
        return False

    def low_rank(self, inputs, a, b):
        kernel = ops.matmul(a, b)
        return self.product(inputs, ops.reshape(kernel, self.variable.shape))

    def product(self, inputs, kernel):
        layer = self.layer
        return ops.depthwise_conv(
            inputs,
            kernel,
            strides=layer.strides,
            padding=layer.padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )


class SeparableKernel(ConvKernel):
    """`SeparableConv1D/2D`: the pointwise kernel, which mixes the channels.

    A row is one channel of what the depthwise kernel gives. That one stays: it
    holds `taps / filters` times as many weights.
    """

    def __init__(self, layer):
        self.layer = layer
        self.channels_last = layer.data_format == "channels_last"
        *self.taps, self.outputs = layer.pointwise_kernel.shape
        self.inputs = math.prod(self.taps)

    @property
    def variable(self):
        return self.layer.pointwise_kernel

    @property
    def window(self):
        return 1

    @property
    def rows_are_inputs(self):
        return False

    @property
    def columns_share_inputs(self):
        return True

    def down(self, inputs, a):
        hidden = self.product(inputs, ops.reshape(a, (*self.taps, -1)))
        return hidden if self.channels_last else ops.moveaxis(hidden, 1, -1)

    def up(self, hidden, b):
        outputs = ops.matmul(hidden, b)
        return outputs if self.channels_last else ops.moveaxis(outputs, -1, 1)

    def product(self, inputs, kernel):
        layer = self.layer
        return ops.separable_conv(
            inputs,
            ops.cast(layer.depthwise_kernel, inputs.dtype),
            kernel,
            strides=layer.strides,
            padding=layer.padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )


class EmbeddingKernel(DenseKernel):
    """`Embedding`: row `i` of the matrix is the vector of token `i`."""

    @property
    def variable(self):
        return self.layer.embeddings

    @property
    def bias(self):
        return None

    @property
    def rows_are_inputs(self):
        return False

    def units(self, dtype):
        return ops.arange(self.inputs, dtype="int32")

    def from_unit_outputs(self, outputs):
        return outputs

    def down(self, inputs, a):
        return ops.take(a, ops.cast(inputs, "int32"), axis=0)


class ReversibleEmbeddingKernel(EmbeddingKernel):
    """`ReversibleEmbedding`: the tied output reads the same matrix."""

    def low_rank_reverse(self, inputs, a, b):
        """`inputs @ (a @ b).T`, the logits' share of the delta."""
        hidden = ops.matmul(inputs, ops.transpose(b))
        return ops.matmul(hidden, ops.transpose(a))


_KERNELS = (
    (keras.layers.Dense, DenseKernel),
    (keras.layers.EinsumDense, EinsumKernel),
    (keras.layers.Conv1D, ConvKernel),
    (keras.layers.Conv2D, ConvKernel),
    (keras.layers.Conv3D, ConvKernel),
    (keras.layers.DepthwiseConv1D, DepthwiseKernel),
    (keras.layers.DepthwiseConv2D, DepthwiseKernel),
    (keras.layers.SeparableConv1D, SeparableKernel),
    (keras.layers.SeparableConv2D, SeparableKernel),
    (keras.layers.ReversibleEmbedding, ReversibleEmbeddingKernel),
    (keras.layers.Embedding, EmbeddingKernel),
)


def has_kernel(layer):
    """Whether a built layer has a kernel that is one matrix."""
    if not isinstance(layer, tuple(kind for kind, _ in _KERNELS)):
        return False
    try:
        kernel_of(layer)
    except TypeError:  # One matrix per expert, for example.
        return False
    return True


def multiplies(layer):
    """Whether a built layer multiplies its inputs by such a kernel."""
    embeds = isinstance(layer, keras.layers.Embedding)
    return has_kernel(layer) and not embeds


def kernel_of(layer):
    """The matrix view of a built layer's kernel."""
    for kind, view in _KERNELS:
        if isinstance(layer, kind):
            return view(layer)
    raise TypeError(
        f"Layer {layer.name!r} has no kernel that can be adapted. Kinds that "
        f"can: {', '.join(kind.__name__ for kind, _ in _KERNELS)}. "
        f"Received: {type(layer).__name__}"
    )
