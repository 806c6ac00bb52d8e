"""How the factors of LoRA start."""

import math

import numpy as np

from keras_peft.kernels import EmbeddingKernel
from keras_peft.quantized import FORMATS

# These start from a part of the kernel itself.
RESIDUAL_INITS = ("pissa", "olora", "loftq")
INITS = ("default", "gaussian", "orthogonal", "eva", *RESIDUAL_INITS)
# Of LoftQ, as in its paper.
_LOFTQ_STEPS = 5


def starts_in_kernel(init, kernel):
    """Whether the start values' product is subtracted again by the adapter.

    Not LoftQ's over a kernel in 4 or 8 bits: there it is what rounding lost.
    """
    return init in RESIDUAL_INITS and not (init == "loftq" and kernel.is_packed)


def start_values(init, kernel, rank, scale, rng):
    """`(A, B)` as float32 arrays, by any `init` but `"eva"`.

    `kernel` is the view of a matrix: `inputs`, `outputs` and `read()`.
    """
    inputs, outputs = kernel.inputs, kernel.outputs
    a, b = np.zeros((inputs, rank)), np.zeros((rank, outputs))
    if init == "pissa":
        a, b = _leading_part(kernel.read(), rank, scale)
    elif init == "loftq" and kernel.is_packed:
        a, b = _leading_part(_rounded_off(kernel), rank, scale)
    elif init == "loftq":
        matrix = kernel.read()
        for _ in range(_LOFTQ_STEPS):
            rounded = FORMATS["nf4"].round(matrix - scale * (a @ b))
            a, b = _leading_part(matrix - rounded, rank, scale)
    elif init == "olora":
        # Of the transposed kernel, so that the orthonormal factor is B.
        q, r = np.linalg.qr(kernel.read().T)
        a, b = r[:rank].T, q[:, :rank].T
    elif init == "orthogonal":
        basis, _ = np.linalg.qr(rng.normal(size=(rank, rank)))
        a = rng.normal(size=(inputs, rank // 2)) @ basis[0::2] / 10
        b = basis[1::2].T @ rng.normal(size=(rank // 2, outputs)) / 10
    elif isinstance(kernel, EmbeddingKernel):
        b = rng.normal(size=b.shape)
    elif init == "gaussian":
        a = rng.normal(scale=1 / rank, size=a.shape)
    else:
        bound = 1 / math.sqrt(inputs)
        a = rng.uniform(-bound, bound, size=a.shape)
    return a.astype("float32"), b.astype("float32")


def _rounded_off(kernel):
    """What a packed kernel has lost."""
    if kernel.variable.original is None:
        raise ValueError(
            "`init='loftq'` makes up for what rounding the base lost, which "
            "is known only while it is rounded. Load the model as it is, and "
            "let `keras_peft.adapt(..., base='nf4')` round it. Received: "
            f"kernel {kernel.variable.path!r} in {kernel.variable.form.name}"
        )
    return kernel.read_original() - kernel.read()


def _leading_part(matrix, rank, scale):
    """`(A, B)` with `scale * A @ B` nearest to `matrix`, equal in size."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(values[:rank] / scale)
    return left[:, :rank] * root, root[:, None] * right[:rank]


def leading_directions(adapter):
    """The leading right singular vectors of the layer's inputs."""
    observed, rank = adapter.observed, adapter.rank
    if observed is None:
        raise ValueError(
            "`init='eva'` starts from data. Use `keras_peft.adapt(model, "
            "method, calibration=...)`, or another `init`. "
            f"Received: layer={adapter.path!r}"
        )
    if observed.count < rank:
        raise ValueError(
            f"`init='eva'` needs at least as many inputs of a layer as its "
            f"rank, {rank}. Pass more data as `calibration`. "
            f"Received: {observed.count} inputs of {adapter.path!r}"
        )
    # Their Gram matrix has these as eigenvectors, in ascending order.
    _, vectors = np.linalg.eigh(observed.gram)
    return vectors[:, ::-1][:, :rank]
