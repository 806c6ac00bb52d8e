"""One adapter out of several: folders in, a folder out, no model needed."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from keras_peft import adapter_io
from keras_peft import lora_folder
from keras_peft.combination import FULL
from keras_peft.combination import THIN
from keras_peft.combination import Combination
from keras_peft.files import whole_folder
from keras_peft.fingerprint import differences
from keras_peft.lora_folder import FACTORS
from keras_peft.low_rank import LowRankReport
from keras_peft.methods.lora import LoRA


def combine_adapters(
    adapters: Sequence[str | Path],
    weights: Sequence[float],
    folder: str | Path,
    method: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    seed: int | None = None,
    head: int | None = None,
) -> LowRankReport:
    r"""Writes the weighted sum of LoRA adapters as one LoRA adapter.

    What is combined are the changes of the kernels, `scale * A @ B` of each
    adapter, whatever its rank, alpha and scaling. A layer that an adapter does
    not have counts as unchanged there; an adapter of weight 0 is left out. The
    result has scale 1, no dropout, and a `rank_pattern` where its layers
    differ.

    - `"cat"`: `A` and `B` of all adapters side by side. Exact; the ranks add
      up.
    - `"linear"`: the same sum in as few ranks as it has. Exact; of the same
      adapter twice the rank is that of one.
    - `"svd"`: the best approximation of the sum of at most `rank`.
    - `"ties"`: of each weighted change the share `density` of largest
      magnitude is kept; the sign with the larger total wins each entry, and
      the entries of that sign are averaged.
      [Yadav et al., 2023](https://arxiv.org/abs/2306.01708)
    - `"dare"`: a random share `density` of each change is kept and divided by
      `density`, then summed.
      [Yu et al., 2023](https://arxiv.org/abs/2311.03099)
    - `"magnitude_prune"`: the share `density` of largest magnitude of each
      change is kept, then summed.

    The last three are no sums of low rank: they are formed in full, one layer
    at a time, and approximated as by `"svd"`.

    Args:
        adapters: Folders that `save_adapter` wrote, of LoRA on one base.
        weights: As many numbers, negative ones included.
        folder: Path of the folder to write. It appears whole or not at all.
        method: One of the above.
        rank: Positive integer, for the methods that approximate. `None` takes
            the largest rank that an adapter has at the layer; PiSSA, OLoRA
            and LoftQ count twice, `A @ B` and the start that they subtract.
        density: Number in `(0, 1]`, for `"ties"`, `"dare"` and
            `"magnitude_prune"`.
        seed: Integer, for `"dare"`. `None` draws one from Python's generator,
            which `keras.utils.set_random_seed` seeds.
        head: Which adapter's head is kept, as an index into `adapters`. Heads
            are never averaged: `None` asks for equal ones.

    Returns:
        A `LowRankReport` with the rank of each layer, and what it misses of
        the combined change: of the sum for `"svd"`, of the pruned sum for the
        last three.

    Raises:
        ValueError: if a folder is damaged or holds another method than LoRA,
            the adapters do not belong to one base, or the result would be
            larger than a kernel allows. Nothing is written then.

    Example:
    >>> keras_peft.combine_adapters(["a/", "b/"], [0.7, 0.3], "both/")
    >>> keras_peft.load_adapter(model, "both/")
    """
    _check_arguments(adapters, weights, method, rank, density, seed)
    sources = [lora_folder.read(path) for path in adapters]
    _check_fit(sources)
    kept = _choose_head(sources, head)
    if method == "dare":
        seed = random.randint(0, 2**31 - 1) if seed is None else seed
    combination = Combination(
        method, rank, density, np.random.default_rng(seed)
    )
    layers = {p: kind for s in sources for p, kind in s.layers.items()}
    found = {}
    for path in layers:
        changes = [
            (weight, *source.change(path))
            for weight, source in zip(weights, sources, strict=True)
            if weight and path in source.layers
        ]
        if changes:
            found[path] = combination.of(changes)
    _check_ranks(found, method)
    _write(folder, sources[0], layers, found, kept)
    return LowRankReport(
        {path: a.shape[1] for path, (a, _, _) in found.items()},
        {path: residual for path, (_, _, residual) in found.items()},
    )


# -- Reading and checking ----------------------------------------------------


def _check_arguments(adapters, weights, method, rank, density, seed):
    if method not in THIN + FULL:
        known = ", ".join(map(repr, THIN + FULL))
        raise ValueError(
            f"`method` must be one of {known}. Received: method={method!r}"
        )
    if isinstance(adapters, str | Path) or len(adapters) != len(weights):
        raise ValueError(
            "Expected a list of adapter folders and one weight for each. "
            f"Received: adapters={adapters!r}, weights={weights!r}"
        )
    if not np.isfinite(weights).all() or not np.any(weights):
        raise ValueError(
            "The weights must be finite numbers, and not all of them zero. "
            f"Received: weights={weights!r}"
        )
    approximates, prunes = method not in ("cat", "linear"), method in FULL
    _check_used("rank", rank, approximates, method)
    _check_used("density", density, prunes, method)
    _check_used("seed", seed, method == "dare", method)
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise ValueError(
            f"`rank` must be a positive integer. Received: rank={rank!r}"
        )
    if prunes and (density is None or not 0 < density <= 1):
        raise ValueError(
            f"`method={method!r}` needs `density`, the share of entries to "
            f"keep, in (0, 1]. Received: density={density!r}"
        )


def _check_used(name, value, used, method):
    if value is not None and not used:
        raise ValueError(
            f"`method={method!r}` has no use for `{name}`; leave it out. "
            f"Received: {name}={value!r}"
        )


def _check_fit(sources):
    """Raises unless all adapters belong to the same layers of one base."""
    first = sources[0]
    for source in sources[1:]:
        wrong = differences(first.settings["base"], source.settings["base"])
        if first.settings["head"] != source.settings["head"]:
            heads = source.settings["head"], first.settings["head"]
            wrong.insert(0, f"its head is {heads[0]}, not {heads[1]}")
        if wrong:
            raise ValueError(
                "The adapters do not belong to one base: "
                f"{'; '.join(wrong[:8])}. Combine adapters of one base. "
                f"Received: {source.folder!r}, compared with {first.folder!r}"
            )


def _choose_head(sources, index):
    if index is None:
        first = sources[0].head
        for source in sources[1:]:
            if any(not np.array_equal(first[k], source.head[k]) for k in first):
                raise ValueError(
                    "The adapters have different heads, which are never "
                    "averaged. Say whose is kept: `head=0` keeps that of "
                    f"{sources[0].folder!r}. Received: head=None"
                )
        return first
    if not 0 <= index < len(sources):
        raise ValueError(
            f"`head` must be an index into the {len(sources)} adapters. "
            f"Received: head={index!r}"
        )
    return sources[index].head


def _check_ranks(found, method):
    large = [
        f"`{path}` gets rank {a.shape[1]} over a kernel of "
        f"[{a.shape[0]}, {b.shape[1]}]"
        for path, (a, b, _) in found.items()
        if a.shape[1] > min(a.shape[0], b.shape[1])
    ]
    if large:
        raise ValueError(
            "The ranks add up to more than a kernel has: "
            f"{'; '.join(large)}. Use `method='linear'`, which is as exact. "
            f"Received: method={method!r}"
        )


# -- Writing -----------------------------------------------------------------


def lora_of(ranks: dict[str, int]) -> LoRA:
    """The settings of a LoRA of scale 1 with that rank at each path."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {
        # From the start of a path: `out` alone also names `block.out`.
        f"^{re.escape(path)}": rank
        for path, rank in ranks.items()
        if rank != common
    }
    return LoRA(common, rank_pattern=others or None)


def _write(folder, source, layers, found, head):
    tensors = {
        f"{path}.{key}": factor
        for path, (*factors, _) in found.items()
        for key, factor in zip(FACTORS, factors, strict=True)
    }
    with whole_folder(folder) as staging:
        adapter_io.write_files(
            staging,
            lora_of({path: a.shape[1] for path, (a, _, _) in found.items()}),
            {path: layers[path] for path in found},
            source.settings["head"],
            tensors | head,
            source.settings["base"],
        )
