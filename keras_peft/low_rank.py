"""Matrices of low rank, as two thin factors.

All in float64: what a factorization loses has to be far below the float32 of
the adapters that hold its result.
"""

import dataclasses

import numpy as np

# Eight roundings of float32: what is left of a matrix below this share of its
# norm is rounding, and no rank of it.
EXACT = 2.0**-20


@dataclasses.dataclass(frozen=True)
class LowRankReport:
    """How well adapters of low rank hold the changes they stand for.

    Attributes:
        ranks: `{path: rank}` of every layer.
        residuals: `{path: residual}`, the norm of what the factors miss of the
            layer's change, over the norm of that change. About 1e-7 where the
            rank is enough.
        left_out: `{variable: size}` of changes that no low-rank adapter can
            hold, such as those of biases: the norm of the change over the norm
            of the variable, which stays as it was.
    """

    ranks: dict[str, int]
    residuals: dict[str, float]
    left_out: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def worst(self) -> tuple[str, float]:
        """`(path, residual)` of the layer whose change is held worst."""
        path = max(self.residuals, key=lambda path: self.residuals[path])
        return path, self.residuals[path]


def decompose(matrix: np.ndarray) -> tuple:
    """The singular value decomposition of a matrix."""
    return np.linalg.svd(matrix.astype("float64"), full_matrices=False)


def decompose_product(a: np.ndarray, b: np.ndarray) -> tuple:
    """That of `a @ b`, for thin factors: the product is never formed."""
    left, a_core = np.linalg.qr(a.astype("float64"))
    right, b_core = np.linalg.qr(b.T.astype("float64"))
    u, values, v = np.linalg.svd(a_core @ b_core.T, full_matrices=False)
    # What terms that cancel leave behind.
    noise = 2.0**-48 * np.linalg.norm(a_core) * np.linalg.norm(b_core)
    values = np.where(values > noise, values, 0.0)
    return left @ u, values, v @ right.T


def rank_for(values: np.ndarray, rank: int | float | None) -> int:
    """How many singular values are needed.

    Args:
        values: All singular values, the largest first.
        rank: The most that may be kept; or a share of the energy, the sum of
            squares, that must be; or `None` for everything above rounding.
    """
    tails = np.sqrt(np.cumsum(values[::-1] ** 2)[::-1])
    exact = int((tails > EXACT * tails[0]).sum())
    if isinstance(rank, float):
        missed = np.sqrt(1.0 - rank) * tails[0]
        exact = min(exact, int((tails > missed).sum()))
    elif rank is not None:
        exact = min(exact, rank)
    # Nothing has rank zero: such an adapter could not learn.
    return max(exact, 1)


def factors(decomposition: tuple, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """`(a, b)` in float32, whose product is the best of that rank.

    Each bears half of the size. Where the matrix is zero `b` alone is, or
    neither would have a gradient.
    """
    left, values, right = decomposition
    root = np.sqrt(values[:rank])
    a = left[:, :rank] * np.where(root > 0, root, 1.0)
    b = root[:, None] * right[:rank]
    return stored(a), stored(b)


def stored(factor: np.ndarray) -> np.ndarray:
    """A factor as adapter files keep it."""
    return np.ascontiguousarray(factor, dtype="float32")


def product_norm(a: np.ndarray, b: np.ndarray) -> float:
    """The norm of `a @ b`, for thin factors."""
    return float(np.linalg.norm(decompose_product(a, b)[1]))
