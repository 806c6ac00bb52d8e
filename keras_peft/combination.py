"""Ways to combine the changes that several adapters make to one kernel."""

import dataclasses
import math

import numpy as np

from keras_peft import low_rank

# Sums of thin factors, and what has to be formed in full.
THIN = ("cat", "linear", "svd")
FULL = ("ties", "dare", "magnitude_prune")


@dataclasses.dataclass
class Combination:
    """One way to combine the changes of one layer."""

    method: str
    rank: int | None
    density: float | None
    rng: np.random.Generator

    def of(self, changes: list[tuple]) -> tuple:
        """`(a, b, residual)` of `[(weight, a, b), ...]`, in float64."""
        if self.method in FULL:
            return self._full(changes)
        a = np.concatenate([a for _, a, _ in changes], axis=1)
        b = np.concatenate([weight * b for weight, _, b in changes])
        if self.method == "cat":
            found = low_rank.stored(a), low_rank.stored(b)
        else:
            decomposition = low_rank.decompose_product(a, b)
            rank = self._rank(changes) if self.method == "svd" else None
            rank = low_rank.rank_for(decomposition[1], rank)
            found = low_rank.factors(decomposition, rank)
        missed = low_rank.product_norm(
            np.concatenate([a, -found[0]], axis=1),
            np.concatenate([b, found[1]]),
        )
        return *found, _share(missed, low_rank.product_norm(a, b))

    def _full(self, changes):
        change = self._merge([weight * (a @ b) for weight, a, b in changes])
        decomposition = low_rank.decompose(change)
        rank = low_rank.rank_for(decomposition[1], self._rank(changes))
        a, b = low_rank.factors(decomposition, rank)
        missed = np.linalg.norm(change - a.astype("float64") @ b)
        return a, b, _share(missed, np.linalg.norm(change))

    def _rank(self, changes):
        return self.rank or max(a.shape[1] for _, a, _ in changes)

    def _merge(self, changes):
        """The sum of pruned changes, in full."""
        if self.method == "dare":
            kept = [self.rng.random(c.shape) < self.density for c in changes]
            pairs = zip(changes, kept, strict=True)
            return sum(c * k for c, k in pairs) / self.density
        changes = [_prune(change, self.density) for change in changes]
        if self.method == "magnitude_prune":
            return sum(changes)
        elected = np.sign(sum(changes))
        agree = [np.sign(change) * elected > 0 for change in changes]
        pairs = zip(changes, agree, strict=True)
        return sum(c * k for c, k in pairs) / np.maximum(sum(agree), 1)


def _prune(change, density):
    """Zero but for the share `density` of largest magnitude."""
    sizes = np.abs(change)
    dropped = change.size - math.ceil(density * change.size)
    smallest = np.partition(sizes, dropped, axis=None)[dropped]
    return np.where(sizes >= smallest, change, 0.0)


def _share(missed, total):
    return float(missed / total) if total else 0.0
