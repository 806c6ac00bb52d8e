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
    # Whether both formulas take the taps of the kernel, as `taps`.
    by_tap: bool = False
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


def lora_bias(kernel, settings, lora_bias, **factors):
    """The bias of `B` is none of the kernel's matter."""
    return lora(kernel, settings, **factors)


def bias_of_b(bias, settings, lora_bias, **factors):
    """What `scale * (hidden @ B + b)` leaves beside the kernel."""
    return bias + settings.scale_of("layer") * lora_bias


def residual(kernel, settings, lora_initial_a, lora_initial_b, **factors):
    """PiSSA's Eq. 5: the kernel less its start, plus what it became."""
    start = lora(0.0, settings, lora_initial_a, lora_initial_b)
    return lora(kernel - start, settings, **factors)


def ia3(kernel, settings, ia3_scale):
    """Section 3.3 of the IA3 paper: outputs are scaled, or inputs."""
    return kernel * (ia3_scale[:, None] if settings.feedforward else ia3_scale)


def ia3_bias(bias, settings, ia3_scale):
    return bias if settings.feedforward else bias * ia3_scale


def cayley(skew):
    """(I - Q) (I + Q)^-1."""
    identity = np.eye(len(skew))
    return (identity - skew) @ np.linalg.inv(identity + skew)


def neumann(skew, terms):
    """OFTv2's Eq. 4, of which the last term counts once."""
    powers = [np.linalg.matrix_power(skew, k) for k in range(terms)]
    return powers[0] + 2 * sum(powers[1:-1]) + powers[-1]


def diagonal(blocks):
    """The block diagonal matrix."""
    size = len(blocks[0])
    matrix = np.zeros((len(blocks) * size,) * 2)
    for i, block in enumerate(blocks):
        matrix[i * size : (i + 1) * size, i * size : (i + 1) * size] = block
    return matrix


def oft(kernel, settings, oft_rotation):
    """Eq. 3 of the OFT paper; `x R` is what OFTv2 computes."""
    count = oft_rotation.shape[1]
    size = int(1 + np.sqrt(1 + 8 * count)) // 2
    blocks = []
    for entries in oft_rotation:
        skew = np.zeros((size, size))
        skew[np.triu_indices(size, 1)] = entries
        skew -= skew.T
        exact = settings.cayley == "exact"
        blocks.append(cayley(skew) if exact else neumann(skew, settings.terms))
    if settings.block_share:
        blocks *= len(kernel) // size
    return diagonal(blocks) @ kernel


def boft(kernel, settings, boft_rotation, boft_scale):
    """Eq. 4 of the BOFT paper: block `k` of a factor acts on a butterfly."""
    inputs, size = len(kernel), boft_rotation.shape[-1]
    for factor, matrices in enumerate(boft_rotation):
        skew = (matrices - matrices.swapaxes(1, 2)) / 2
        rotation = diagonal([cayley(q) for q in skew])
        # Halves of blocks 2**(factor - 1) blocks apart become neighbours.
        half, apart = max(size // 2, 1), 2**factor
        places = [
            (start + pair + side * apart) * half + entry
            for start in range(0, inputs // half, 2 * apart)
            for pair in range(apart)
            for side in (0, 1)
            for entry in range(half)
        ]
        permutation = np.eye(inputs)[places] if factor else np.eye(inputs)
        kernel = permutation.T @ rotation @ permutation @ kernel
    return kernel * boft_scale


def hra(kernel, settings, hra_vectors):
    """Eq. 4 of the HRA paper: one reflection after the other."""
    for vector in hra_vectors.T:
        unit = vector / np.linalg.norm(vector)
        kernel = kernel - 2 * np.outer(unit, unit @ kernel)
    return kernel


def road(kernel, settings, road_theta, road_alpha):
    """Eq. 4 of the RoAd paper, pair by pair."""
    merged = np.zeros_like(kernel)
    size, half = settings.group_size, settings.group_size // 2
    for i in range(kernel.shape[-1]):
        group, place = i // size * size, i % size
        partner = group + (place + half) % size
        if settings.variant == 1:
            own = cross = group // 2 + place % half
        elif settings.variant == 2:
            own = cross = i
        else:
            own, cross = 2 * group + place, 2 * group + size + place
        sign = -1 if place < half else 1
        merged[..., i] = (
            road_alpha[own] * np.cos(road_theta[own]) * (kernel[..., i])
            + sign
            * road_alpha[cross]
            * np.sin(road_theta[cross])
            * (kernel[..., partner])
        )
    return merged


def tokens(kernel, settings, token_change):
    merged = kernel.copy()
    merged[settings.token_ids] += token_change
    return merged


def loha(kernel, settings, loha_a1, loha_b1, loha_a2, loha_b2):
    """Proposition 1 of the FedPara paper."""
    scale = settings.scale_of("layer")
    return kernel + scale * (loha_a1 @ loha_b1) * (loha_a2 @ loha_b2)


def lokr(kernel, settings, taps, **factors):
    """Eq. 7 of the LyCORIS paper, the same first factor at each tap."""
    w1, w2 = (
        factors.get(key)
        if key in factors
        else factors[f"{key}_a"] @ factors[f"{key}_b"]
        for key in ("lokr_w1", "lokr_w2")
    )
    delta = [np.kron(w1, tap) for tap in np.split(w2, taps)]
    return kernel + settings.scale_of("layer") * np.concatenate(delta)


def lokr_count(rank, factor=None, both=False):
    """Section 3.3 of the LyCORIS paper: `i1 * o1`, and `rank` or all of W2."""

    def divisor(size):
        if factor and size % factor == 0:
            return factor
        limit = min(factor or size, int(size**0.5))
        return max(n for n in range(1, limit + 1) if size % n == 0)

    def count(sides, taps, decomposed):
        i, o = sides
        thin = decomposed and rank < max(sides) / 2
        return rank * (taps * i + o) if thin else taps * i * o

    def total(i, o, taps):
        i1, o1 = divisor(i // taps), divisor(o)
        w2 = (i // taps // i1, o // o1)
        return count((i1, o1), 1, both) + count(w2, taps, True)

    return total


def vera(kernel, settings, vera_lambda_d, vera_lambda_b, **projections):
    """Eq. 2 of the VeRA paper, in the kernel's orientation."""
    a, b = projections["vera_projection_a"], projections["vera_projection_b"]
    return kernel + a @ np.diag(vera_lambda_d) @ b @ np.diag(vera_lambda_b)


def miss(kernel, settings, miss_block):
    """Eq. 4 of the MiSS paper: one block for all shards."""
    shards = -(-len(kernel) // len(miss_block))
    return kernel + np.tile(miss_block, (shards, 1))[: len(kernel)]


def shira(kernel, settings, shira_values, shira_indices):
    merged = kernel.copy()
    np.add.at(merged, tuple(shira_indices.astype(int).T), shira_values)
    return merged


def adalora(kernel, settings, adalora_p, adalora_e, adalora_q, adalora_mask):
    """Eq. 3 of the AdaLoRA paper."""
    scale = (settings.alpha or settings.rank) / settings.rank
    values = np.diag(adalora_e * adalora_mask)
    return kernel + scale * adalora_p @ values @ adalora_q


EMBEDDINGS = ("embedding", "reversible")
NO_BIAS = ("dense-gelu", "einsum-gemma", "einsum-ellipsis", *EMBEDDINGS)
# Kernels of which the rows are taps, or channels inside the layer.
TAPS = (
    "conv1d",
    "conv2d-strided",
    "conv2d-groups",
    "conv3d",
    "depthwise",
    "separable",
)
# Of which outputs see different inputs.
GROUPED = ("conv2d-groups", "depthwise")
# Of which the rows do not fall into blocks of four, `SMALL` beside.
NO_FOURS = ("einsum-output", "conv1d", "conv2d", "depthwise")
# Of five rows and six columns.
SMALL = (
    "dense",
    "einsum-query",
    "einsum-gemma",
    "einsum-ellipsis",
    "einsum-transposed",
    "conv2d-pointwise",
)


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
    "lora-loftq": Method(
        _lora(init="loftq", alpha=3), exact_start=False, merged=residual
    ),
    "lora-olora": Method(
        _lora(init="olora"), exact_start=False, merged=residual
    ),
    "lora-dropout": Method(_lora(dropout=0.5), merged=lora),
    "lora-bias": Method(
        _lora(use_bias=True, alpha=3),
        parameters=lambda i, o: 2 * (i + o) + o,
        merged=lora_bias,
        merged_bias=bias_of_b,
        refuses=NO_BIAS,
    ),
    "dora": Method(
        _lora(decompose=True, alpha=3),
        exact_start=False,
        parameters=lambda i, o: 2 * (i + o) + o,
        merged=dora,
        slice=True,
    ),
    "ia3": Method(
        keras_peft.IA3,
        parameters=lambda i, o: o,
        merged=ia3,
        merged_bias=ia3_bias,
        refuses=EMBEDDINGS,
        slice=True,
    ),
    "ia3-inputs": Method(
        lambda: keras_peft.IA3(feedforward=["layer"]),
        parameters=lambda i, o: i,
        merged=ia3,
        merged_bias=ia3_bias,
        refuses=(*EMBEDDINGS, *TAPS),
        models=(),
    ),
    "oft": Method(
        lambda: keras_peft.OFT(num_blocks=1),
        parameters=lambda i, o: i * (i - 1) // 2,
        merged=oft,
        refuses=EMBEDDINGS,
        # A series of large blocks far from zero turns into no rotation, and
        # layer upon layer multiplies what rounding loses.
        models=(),
        slice=True,
    ),
    "oft-exact": Method(
        lambda: keras_peft.OFT(num_blocks=1, cayley="exact"),
        parameters=lambda i, o: i * (i - 1) // 2,
        merged=oft,
        refuses=EMBEDDINGS,
    ),
    "oft-blocks": Method(
        lambda: keras_peft.OFT(block_size=4, terms=7),
        parameters=lambda i, o: i * 3 // 2,
        merged=oft,
        refuses=(*EMBEDDINGS, *SMALL, *NO_FOURS),
    ),
    "oft-shared": Method(
        lambda: keras_peft.OFT(block_size=3, cayley="exact", block_share=True),
        parameters=lambda i, o: 3,
        merged=oft,
        refuses=(*EMBEDDINGS, *SMALL),
        models=(),
    ),
    "boft": Method(
        lambda: keras_peft.BOFT(num_blocks=1),
        parameters=lambda i, o: i * i + o,
        merged=boft,
        refuses=EMBEDDINGS,
        models=(),
        slice=True,
    ),
    "boft-butterfly": Method(
        lambda: keras_peft.BOFT(block_size=2, num_factors=3),
        parameters=lambda i, o: 3 * 2 * i + o,
        merged=boft,
        refuses=(*EMBEDDINGS, *SMALL, *NO_FOURS),
    ),
    "hra": Method(
        lambda: keras_peft.HRA(rank=4),
        exact_start=False,
        parameters=lambda i, o: 4 * i,
        merged=hra,
        refuses=EMBEDDINGS,
        slice=True,
    ),
    "road": Method(
        lambda: keras_peft.RoAd(group_size=2),
        parameters=lambda i, o: o,
        merged=road,
        merged_bias=road,
        refuses=(*EMBEDDINGS, *GROUPED, "einsum-output"),
        slice=True,
    ),
    "road-2": Method(
        lambda: keras_peft.RoAd(variant=2, group_size=4),
        parameters=lambda i, o: 2 * o,
        merged=road,
        merged_bias=road,
        refuses=(*EMBEDDINGS, *GROUPED, *SMALL, "einsum-output", "conv"),
    ),
    "road-4": Method(
        lambda: keras_peft.RoAd(variant=4, group_size=6),
        parameters=lambda i, o: 4 * o,
        merged=road,
        merged_bias=road,
        refuses=(*EMBEDDINGS, *GROUPED, "einsum-output"),
        models=(),
    ),
    "bias": Method(
        keras_peft.BiasTuning,
        parameters=lambda i, o: o,
        merged=lambda kernel, settings, **_: kernel,
        merged_bias=lambda bias, settings, bias_change: (
            bias + bias_change.ravel()
        ),
        refuses=NO_BIAS,
        models=("bert-classifier", "gpt2", "convolutional"),
        slice=True,
    ),
    "loha": Method(
        lambda: keras_peft.LoHa(rank=2, alpha=3),
        parameters=lambda i, o: 4 * (i + o),
        merged=loha,
        slice=True,
    ),
    "lokr": Method(
        lambda: keras_peft.LoKr(rank=1, alpha=2),
        parameters=lokr_count(1),
        merged=lokr,
        by_tap=True,
        slice=True,
    ),
    "lokr-both": Method(
        lambda: keras_peft.LoKr(
            rank=1, decompose_both=True, decompose_factor=3
        ),
        parameters=lokr_count(1, 3, both=True),
        merged=lokr,
        by_tap=True,
        models=(),
    ),
    "lokr-whole": Method(
        lambda: keras_peft.LoKr(rank=8, decompose_factor=2),
        parameters=lokr_count(8, 2),
        merged=lokr,
        by_tap=True,
        models=(),
    ),
    "vera": Method(
        lambda: keras_peft.VeRA(rank=8),
        parameters=lambda i, o: 8 + o,
        merged=vera,
        slice=True,
    ),
    "miss": Method(
        lambda: keras_peft.MiSS(rank=2),
        parameters=lambda i, o: 2 * o,
        merged=miss,
        slice=True,
    ),
    "shira": Method(
        lambda: keras_peft.SHiRA(rank=1),
        parameters=lambda i, o: i + o,
        merged=shira,
        slice=True,
    ),
    "adalora": Method(
        lambda: keras_peft.AdaLoRA(rank=2, alpha=3),
        parameters=lambda i, o: 2 * (i + o + 1),
        merged=adalora,
        slice=True,
    ),
    "norm": Method(
        keras_peft.NormTuning,
        refuses=("",),
        models=("bert-classifier", "gpt2", "llama", "convolutional"),
    ),
    "token": Method(
        lambda: keras_peft.TokenTuning([7, 0, 3]),
        parameters=lambda i, o: 3 * o,
        merged=tokens,
        refuses=("dense", "einsum", "conv", "depthwise", "separable"),
        models=("bert-classifier", "gpt2", "subclassed"),
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
    **{
        name: Method(
            make,
            refuses=("",),
            mergeable=False,
            identity=False,
            models=models,
            slice=name == "prompt-tuning",
        )
        for name, make, models in (
            (
                "prompt-tuning",
                lambda: keras_peft.PromptTuning(2),
                ("gpt2", "llama", "bert-classifier", "own-classifier"),
            ),
            (
                "p-tuning",
                lambda: keras_peft.PTuning(2, hidden_dim=5),
                ("gpt2", "bert-backbone"),
            ),
            (
                "p-tuning-lstm",
                lambda: keras_peft.PTuning(2, encoder="lstm"),
                ("gpt2",),
            ),
            (
                "prefix-tuning",
                lambda: keras_peft.PrefixTuning(2),
                ("gpt2", "llama", "bert-classifier", "vit"),
            ),
            (
                "prefix-tuning-network",
                lambda: keras_peft.PrefixTuning(2, hidden_dim=5),
                ("gpt2", "bert-classifier"),
            ),
            (
                "visual-prompt-tuning",
                lambda: keras_peft.VisualPromptTuning(2),
                ("vit",),
            ),
            (
                "visual-prompt-tuning-deep",
                lambda: keras_peft.VisualPromptTuning(2, deep=True),
                ("vit",),
            ),
        )
    },
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
    taps: int = 1

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
    "einsum-wide": Layer(
        lambda: k.EinsumDense("abcd,cde->abe", (None, 12), bias_axes="e"),
        (2, 4, 3, 8),
        lambda kernel: kernel.reshape(24, 12),
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
        taps=3,
    ),
    "conv2d-strided": Layer(
        lambda: k.Conv2D(6, 3, strides=2, padding="same", activation="relu"),
        (2, 8, 8, 5),
        _flat,
        slice=True,
        taps=9,
    ),
    "conv2d-pointwise": Layer(lambda: k.Conv2D(6, 1), (2, 4, 4, 5), _flat),
    "conv2d-groups": Layer(
        lambda: k.Conv2D(6, 3, groups=2), (2, 6, 6, 4), _flat, taps=9
    ),
    "conv3d": Layer(lambda: k.Conv3D(6, 2), (2, 4, 4, 4, 3), _flat, taps=8),
    "depthwise1d": Layer(
        lambda: k.DepthwiseConv1D(3, depth_multiplier=2),
        (2, 8, 4),
        lambda kernel: kernel.reshape(3, 8),
        taps=3,
    ),
    "depthwise2d": Layer(
        lambda: k.DepthwiseConv2D(3, padding="same", activation="relu"),
        (2, 6, 6, 4),
        lambda kernel: kernel.reshape(9, 4),
        slice=True,
        taps=9,
    ),
    "separable1d": Layer(
        lambda: k.SeparableConv1D(12, 3, depth_multiplier=6, padding="same"),
        (2, 8, 4),
        _flat,
    ),
    "separable2d": Layer(
        lambda: k.SeparableConv2D(12, 3, strides=2, activation="relu"),
        (2, 5, 5, 24),
        _flat,
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
    """The product of tables, `slice` where every part of a row is.

    In half precision the other rows are `slow`: there are hundreds.
    """
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
        pytest.param(*values, id="-".join(ids), marks=_marks(values, sliced))
        for ids, values, sliced in found
    ]


def _marks(values, sliced):
    if sliced:
        return [pytest.mark.slice]
    half = any(dtype in values for dtype in DTYPES if dtype != "float32")
    return [pytest.mark.slow] * half


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
