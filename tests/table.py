"""The rows that every law runs over: methods, layers, models, dtypes."""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np
import pytest

import keras_peft

# -- Methods -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Method:
    """A method, and what its paper promises."""

    make: Callable[[], object]
    # Start values change nothing: bit for bit, or up to rounding where the
    # start is a difference of equal products or a product of orthogonals.
    exact_start: bool = True
    # Parameters of one layer, from its [inputs, outputs].
    parameters: Callable[[int, int], int] = lambda i, o: 2 * (i + o)
    # The merged kernel, from the base's, the settings, and arrays by name.
    merged: Callable[..., np.ndarray] = lambda kernel, settings: kernel
    # The same of the bias, where the paper changes it.
    merged_bias: Callable[..., np.ndarray] = lambda bias, settings, **_: bias
    # Layers that the mathematics leaves out, by the start of their names;
    # `("",)` for a method that is not one of single kernels.
    refuses: tuple[str, ...] = ()
    # Whether its effect is a change of weights.
    mergeable: bool = True
    # Whether its start values leave a model as it was.
    identity: bool = True
    # Small models, of those in `models.py`, to adapt by default targets.
    models: tuple[str, ...] = ("bert-classifier", "gpt2")
    slice: bool = False

    def takes(self, name):
        return not name.startswith(self.refuses)


def lora(kernel, settings, lora_kernel_a, lora_kernel_b):
    """Eq. 3 of the LoRA paper."""
    scale = settings.scale_of("layer")
    return kernel + scale * (lora_kernel_a @ lora_kernel_b)


def dora(kernel, settings, lora_magnitude, **factors):
    """Eq. 5 of the DoRA paper: each column is normed, then scaled."""
    direction = lora(kernel, settings, **factors)
    return lora_magnitude * direction / np.linalg.norm(direction, axis=0)


def residual(kernel, settings, lora_initial_a, lora_initial_b, **factors):
    """PiSSA's Eq. 5: the kernel less its start, plus what it became."""
    start = lora(0.0, settings, lora_initial_a, lora_initial_b)
    return lora(kernel - start, settings, **factors)


def _lora(**settings):
    return lambda: keras_peft.LoRA(rank=2, **settings)


def _in_blocks(make, **promises):
    """A method of networks inside transformer blocks."""
    models = ("bert-classifier", "gpt2", "llama", "vit")
    promises |= dict(refuses=("",), mergeable=False, models=models)
    return Method(make, **promises)


METHODS = {
    "lora": Method(_lora(), merged=lora, slice=True),
    "lora-alpha": Method(_lora(alpha=5), merged=lora),
    "lora-stabilized": Method(
        _lora(alpha=3, scaling="rank_stabilized"), merged=lora
    ),
    "lora-gaussian": Method(_lora(init="gaussian"), merged=lora),
    "lora-orthogonal": Method(
        _lora(init="orthogonal"), exact_start=False, merged=lora
    ),
    "lora-pissa": Method(
        _lora(init="pissa", alpha=3), exact_start=False, merged=residual
    ),
    "lora-olora": Method(
        _lora(init="olora"), exact_start=False, merged=residual
    ),
    "lora-dropout": Method(_lora(dropout=0.5), merged=lora),
    "dora": Method(
        _lora(decompose=True, alpha=3),
        exact_start=False,
        parameters=lambda i, o: 2 * (i + o) + o,
        merged=dora,
        slice=True,
    ),
    "bottleneck": _in_blocks(lambda: keras_peft.BottleneckAdapter(reduction=2)),
    "bottleneck-double": _in_blocks(
        lambda: keras_peft.BottleneckAdapter(
            reduction=2, activation="gelu", placement="double"
        )
    ),
    "bottleneck-parallel": _in_blocks(
        lambda: keras_peft.BottleneckAdapter(
            reduction=2, placement="parallel", scale=4.0
        )
    ),
    # Starts near the identity.
    "adapter-plus": _in_blocks(
        lambda: keras_peft.AdapterPlus(rank=2), identity=False
    ),
    "compacter": _in_blocks(
        lambda: keras_peft.Compacter(reduction=2, num_terms=2)
    ),
    # Starts as a difference of equal matrices, computed twice.
    "reft": _in_blocks(
        lambda: keras_peft.ReFT(rank=2, prefix_positions=1, suffix_positions=2),
        exact_start=False,
    ),
    "direft": _in_blocks(lambda: keras_peft.ReFT(rank=2, variant="direft")),
}

# -- Layers ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layer:
    """A kind of layer, an input for it, and its kernel as the paper sees it."""

    make: Callable[[], keras.layers.Layer]
    shape: tuple  # Of an input, the batch included.
    # Kernel of the layer -> [inputs, outputs], by NumPy alone.
    matrix: Callable[[np.ndarray], np.ndarray]
    vocabulary: int | None = None
    reverse: bool = False
    slice: bool = False

    def build(self, dtype="float32"):
        """`(layer, inputs)`, with a random bias."""
        keras.config.set_dtype_policy(dtype)
        try:
            layer = self.make()
        finally:
            keras.config.set_dtype_policy("float32")
        rng = np.random.default_rng(0)
        if self.vocabulary and not self.reverse:
            inputs = rng.integers(0, self.vocabulary, self.shape)
        else:
            inputs = rng.normal(size=self.shape).astype("float32")
        layer.build(None if self.vocabulary else self.shape)
        for variable in layer.variables:
            noise = rng.normal(scale=0.3, size=variable.shape)
            variable.assign(noise.astype("float32"))
        return layer, inputs

    def call(self, layer, inputs):
        options = {"reverse": True} if self.reverse else {}
        outputs = layer(inputs, **options)
        outputs = keras.ops.cast(outputs, "float32")
        return keras.ops.convert_to_numpy(outputs)


def _flat(kernel):
    return kernel.reshape(-1, kernel.shape[-1])


k = keras.layers
ReversibleEmbedding = k.ReversibleEmbedding

LAYERS = {
    "dense": Layer(lambda: k.Dense(6), (3, 5), _flat, slice=True),
    "dense-relu": Layer(
        lambda: k.Dense(6, activation="relu"), (2, 4, 5), _flat, slice=True
    ),
    "dense-gelu-no-bias": Layer(
        lambda: k.Dense(6, activation="gelu", use_bias=False), (3, 5), _flat
    ),
    "einsum-query": Layer(
        lambda: k.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de"),
        (2, 4, 5),
        lambda kernel: kernel.reshape(5, 6),
        slice=True,
    ),
    "einsum-output": Layer(
        lambda: k.EinsumDense("abcd,cde->abe", (None, 5), bias_axes="e"),
        (2, 4, 2, 3),
        lambda kernel: kernel.reshape(6, 5),
    ),
    "einsum-gemma": Layer(
        lambda: k.EinsumDense("btd,ndh->btnh", (None, 2, 3)),
        (2, 4, 5),
        lambda kernel: np.moveaxis(kernel, 1, 0).reshape(5, 6),
        slice=True,
    ),
    "einsum-ellipsis": Layer(
        lambda: k.EinsumDense("...x,xy->...y", 6, activation="tanh"),
        (2, 4, 5),
        _flat,
    ),
    "einsum-transposed-output": Layer(
        lambda: k.EinsumDense("abc,cd->adb", (6, 4), bias_axes="d"),
        (2, 4, 5),
        _flat,
    ),
    "embedding": Layer(
        lambda: k.Embedding(11, 6), (3, 4), _flat, 11, slice=True
    ),
    "reversible-forward": Layer(
        lambda: ReversibleEmbedding(11, 6), (3, 4), _flat, 11
    ),
    "reversible-tied": Layer(
        lambda: ReversibleEmbedding(11, 6),
        (3, 4, 6),
        _flat,
        11,
        reverse=True,
        slice=True,
    ),
    "reversible-soft-cap": Layer(
        lambda: ReversibleEmbedding(11, 6, logit_soft_cap=2.0),
        (3, 4, 6),
        _flat,
        11,
        reverse=True,
    ),
    "conv1d-causal": Layer(
        lambda: k.Conv1D(6, 3, padding="causal", dilation_rate=2),
        (2, 9, 5),
        _flat,
    ),
    "conv2d": Layer(
        lambda: k.Conv2D(6, 3, strides=2, padding="same", activation="relu"),
        (2, 8, 8, 5),
        _flat,
        slice=True,
    ),
    "conv2d-pointwise": Layer(lambda: k.Conv2D(6, 1), (2, 4, 4, 5), _flat),
    "conv2d-groups": Layer(
        lambda: k.Conv2D(6, 3, groups=2), (2, 6, 6, 4), _flat
    ),
    "conv3d": Layer(lambda: k.Conv3D(6, 2), (2, 4, 4, 4, 3), _flat),
    "depthwise1d": Layer(
        lambda: k.DepthwiseConv1D(3, depth_multiplier=2),
        (2, 8, 4),
        lambda kernel: kernel.reshape(3, 8),
    ),
    "depthwise2d": Layer(
        lambda: k.DepthwiseConv2D(3, padding="same", activation="relu"),
        (2, 6, 6, 4),
        lambda kernel: kernel.reshape(9, 4),
        slice=True,
    ),
}

# -- Dtypes ------------------------------------------------------------------

# Half the distance between 1 and the next number: what one rounding loses.
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-12}
DTYPES = ("float32", "bfloat16", "mixed_bfloat16", "float16")


def rounding(dtype):
    return ROUNDING[dtype.removeprefix("mixed_")]


# -- Rows --------------------------------------------------------------------


def rows(*tables):
    """The product of tables, `slice` where every part of a row is."""
    found = [((), (), True)]
    for table in tables:
        items = list(
            table.items()
            if isinstance(table, dict)
            else zip(table, table, strict=True)
        )
        found = [
            ((*ids, str(key)), (*values, value), sliced and _sliced(value))
            for ids, values, sliced in found
            for key, value in items
        ]
    return [
        pytest.param(
            *values, id="-".join(ids), marks=[pytest.mark.slice] * sliced
        )
        for ids, values, sliced in found
    ]


def method_rows(*tables):
    """`rows` of METHODS x LAYERS x others, without what a method refuses."""
    kept = []
    for name, method in METHODS.items():
        layers = {n: row for n, row in LAYERS.items() if method.takes(n)}
        kept += rows({name: method}, layers, *tables)
    return kept


def _sliced(value):
    if isinstance(value, str):
        return value in ("float32", "bfloat16")
    return getattr(value, "slice", True)


def randomize(model, name="default", scale=0.5):
    """Gives an adapter weights that move the outputs."""
    from keras_peft import adapter_state

    rng = np.random.default_rng(1)
    for leaf in adapter_state.leaves(model, name).values():
        for variable in leaf.learned:
            noise = rng.normal(scale=scale, size=variable.shape)
            value = keras.ops.convert_to_numpy(variable)
            variable.assign(value + noise.astype("float32"))
