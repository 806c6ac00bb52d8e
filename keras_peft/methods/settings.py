"""Settings that several methods share: ranks, and the scale of a change."""

import math
import re

from keras_peft.kernels import has_kernel
from keras_peft.kernels import kernel_of
from keras_peft.patterns import check_pattern
from keras_peft.patterns import path_matches
from keras_peft.raw_kernels import raw_kernels


def check_positive_integer(name, value, usual):
    """Raises a `ValueError` unless `value` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"`{name}` must be a positive integer; {usual} is usual. "
            f"Received: {name}={value!r}"
        )


def check_alpha(alpha):
    """Raises a `ValueError` unless `alpha` is a positive number or `None`."""
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(
            "`alpha` must be a positive number, or `None` for the rank. "
            f"Received: alpha={alpha!r}"
        )


def rank_objection(rank, layer):
    """Why the rank is too large for a layer's kernel, or `None`."""
    kernel = kernel_of(layer)
    limit = min(kernel.inputs, kernel.outputs)
    if rank > limit:
        return (
            f"rank {rank} is larger than its kernel of "
            f"[{kernel.inputs}, {kernel.outputs}] allows ({limit})"
        )
    return None


class Ranked:
    """Mixed into settings with `rank`, `alpha`, and both by layer.

    `rank_pattern` and `alpha_pattern` are dicts from layer names or path
    expressions to what replaces `rank` and `alpha` there, or `None`.
    """

    def check_ranks(self, usual):
        for rank in self.ranks():
            check_positive_integer("rank", rank, usual)
        for alpha in [self.alpha, *(self.alpha_pattern or {}).values()]:
            check_alpha(alpha)
        for pattern in self.patterns:
            check_pattern(pattern)

    def ranks(self):
        """Every rank that a layer may get."""
        return [self.rank, *(self.rank_pattern or {}).values()]

    @property
    def patterns(self):
        """Patterns that must each match a layer of the model."""
        return [*(self.rank_pattern or {}), *(self.alpha_pattern or {})]

    def rank_of(self, path):
        return _by_pattern(self.rank_pattern, path, self.rank)

    def for_layers(self, candidates, paths):
        """Gives kernels that are smaller than `rank` the largest they allow.

        A depthwise 3x3 kernel allows 9. It stays an error where all kernels
        are smaller, and where the user named the layer's rank.
        """
        limits = {
            path: max(map(self.rank_limit, kernels))
            for path in paths
            if (kernels := _kernels(candidates.layers[path]))
        }
        small = {
            f"^{re.escape(path)}": limit
            for path, limit in limits.items()
            if 0 < limit < self.rank == self.rank_of(path)
        }
        if not small or len(small) == len(paths):
            return self
        ranks = {**(self.rank_pattern or {}), **small}
        return type(self)(**self.get_config() | {"rank_pattern": ranks})

    def rank_limit(self, kernel):
        """The largest rank that a kernel allows."""
        return min(kernel.inputs, kernel.outputs)

    def alpha_of(self, path):
        alpha = _by_pattern(self.alpha_pattern, path, self.alpha)
        return self.rank_of(path) if alpha is None else alpha

    def scale_of(self, path):
        """What the product of the factors is multiplied by."""
        return self.alpha_of(path) / self.rank_of(path)


def _kernels(layer):
    return [kernel_of(layer)] if has_kernel(layer) else raw_kernels(layer)


def _by_pattern(patterns, path, default):
    for pattern, value in (patterns or {}).items():
        if path_matches(pattern, path):
            return value
    return default
