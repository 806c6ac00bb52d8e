"""Adapters over one exported base: from their folders to adapter files."""

import dataclasses
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import keras
import numpy as np

from keras_peft import adapted_model
from keras_peft import adapter_io
from keras_peft import adapter_state
from keras_peft.adapt import remove
from keras_peft.convert import to_lora
from keras_peft.export.genai import virtual
from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.decoder import Linear
from keras_peft.export.genai.decoder import Table
from keras_peft.export.genai.decoder import parts
from keras_peft.export.genai.slots import A
from keras_peft.export.genai.slots import B
from keras_peft.low_rank import LowRankReport
from keras_peft.methods.lora import LoRAAdapter
from keras_peft.methods.token_adapters import EmbeddingAdapter
from keras_peft.methods.token_adapters import TokenAdapter

Factors = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Change:
    """What an adapter does to a decoder.

    Attributes:
        low_rank: `{path: (A, B)}`, whose product is added to a kernel.
        prompt: Embeddings of virtual tokens, `[tokens, hidden]`.
        prefix: Keys and values of virtual tokens in every attention,
            `[tokens, blocks, 2, heads, head_size]`.
        report: What was lost where it became one of these only by
            conversion to LoRA.
    """

    low_rank: Mapping[str, Factors] = dataclasses.field(default_factory=dict)
    prompt: np.ndarray | None = None
    prefix: np.ndarray | None = None
    report: LowRankReport | None = None

    @property
    def tokens(self) -> int:
        """How many virtual tokens stand before a text."""
        rows = self.prompt if self.prefix is None else self.prefix
        return 0 if rows is None else len(rows)

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max((a.shape[1] for a, _ in self.low_rank.values()), default=0)


# -- Reading -----------------------------------------------------------------


def read(
    model: keras.Model, folder: str | Path, rank: int | float | None = None
) -> Change:
    """What the adapter in a folder does to `model`, which stays as it is.

    Args:
        model: The base that the adapter was trained on.
        folder: A folder that `save_adapter` wrote, or Hugging Face PEFT.
        rank: As in `keras_peft.to_lora`, for adapters of another kind.

    Raises:
        ValueError: If the adapter does not fit the model, or does what no
            adapter file can hold.
    """
    with loaded(model, folder) as name:
        _check_head(model, folder, name)
        leaves = adapter_state.leaves(model, name)
        for leaf in leaves.values():
            if isinstance(leaf, EmbeddingAdapter):
                return Change(prompt=_numpy(leaf.embeddings()))
            if isinstance(leaf, TokenAdapter) and hasattr(leaf, "prefixes"):
                return Change(prefix=_numpy(leaf.read()))
        report = None
        if not all(map(_is_plain, leaves.values())):
            report = to_lora(model, name, rank)
            leaves = adapter_state.leaves(model, name)
        factors = {path: _factors(leaf) for path, leaf in leaves.items()}
        return Change(factors, report=report)


@contextmanager
def loaded(model: keras.Model, folder: str | Path) -> Iterator[str]:
    """The name of the adapter while `model` carries it."""
    own = adapter_state.is_adapted(model)
    active = dict(model.peft.active) if own else {}
    taken = model.peft.adapters if own else {}
    name = "exported"
    while name in taken:
        name += "_"
    adapter_io.load_adapter(model, folder, name)
    try:
        yield name
    finally:
        remove(model, name)
        if own:
            adapted_model.activate(model, active)


def _check_head(model: keras.Model, folder: str | Path, name: str) -> None:
    before = model.peft.heads[None]
    after = adapter_state.head_values(model, name).values()
    if any(
        not np.array_equal(old, new)
        for old, new in zip(before, after, strict=True)
    ):
        raise ValueError(
            "The adapter trained a head of its own, and one base has one "
            "head. Export this one merged, in a folder of its own. Received: "
            f"{str(folder)!r} with head={model.peft.head}"
        )


def _is_plain(leaf: keras.Layer) -> bool:
    plain = isinstance(leaf, LoRAAdapter)
    return plain and not leaf.decompose and not leaf.use_bias


def _factors(leaf: LoRAAdapter) -> Factors:
    a, b = _numpy(leaf.lora_kernel_a), _numpy(leaf.lora_kernel_b)
    if leaf.residual:
        a = np.concatenate([a, _numpy(leaf.lora_initial_a)], axis=1)
        b = np.concatenate([b, -_numpy(leaf.lora_initial_b)])
    return a, b * np.float32(leaf.scale)


def _numpy(value: object) -> np.ndarray:
    return keras.ops.convert_to_numpy(value).astype("float32")


# -- Packing -----------------------------------------------------------------


def parameters(
    decoder: Decoder, layers: Mapping[str, Sequence[str]], change: Change
) -> dict[str, np.ndarray]:
    """A change as inputs of the graph.

    Args:
        decoder: What the graph was built of.
        layers: The layers at each place, by their keys.
        change: What an adapter does.

    Raises:
        ValueError: If the graph has no place for it.
    """
    if change.prompt is not None:
        return virtual.prompt_parameters(change.prompt)
    if change.prefix is not None:
        return virtual.prefix_parameters(decoder, change.prefix)
    return _low_rank(decoder, layers, change.low_rank)


def _low_rank(
    decoder: Decoder,
    layers: Mapping[str, Sequence[str]],
    changes: Mapping[str, Factors],
) -> dict[str, np.ndarray]:
    """Changes of kernels.

    Layers that the graph computes as one get one `A`, side by side, and one
    `B`, block by block; what reads the same `A` shares it.
    """
    linear = {part.key: part for part in parts(decoder, Linear)}
    tables = {part.path for part in parts(decoder, Table)}
    placed = {linear[key].path for keys in layers.values() for key in keys}
    homeless = [p for p in changes if p in tables or p not in placed]
    if homeless:
        raise ValueError(
            "Adapters at run time change the linear layers of the blocks, and "
            "these are none: "
            f"{', '.join(homeless[:8])}. Train the adapter without them, or "
            "export it merged. "
            f"Received: {len(homeless)} of {len(changes)} layers"
        )
    found = {}
    for slot, keys in layers.items():
        here = [linear[key] for key in keys]
        if any(part.path in changes for part in here):
            found[f"{slot}.{A}"], found[f"{slot}.{B}"] = _packed(here, changes)
    return found


def _packed(here: Sequence[Linear], changes: Mapping[str, Factors]) -> Factors:
    """One `A` and `B` for layers whose outputs lie one after the other."""
    ends = np.cumsum([part.kernel.shape[1] for part in here])
    firsts: list[np.ndarray] = []
    seconds: list[np.ndarray] = []
    for part, end in zip(here, ends, strict=True):
        if part.path not in changes:
            continue
        a, b = changes[part.path]
        b = b if part.columns is None else b[:, part.columns]
        shared = [i for i, f in enumerate(firsts) if np.array_equal(f, a)]
        if not shared:
            shared = [len(firsts)]
            firsts.append(a)
            seconds.append(np.zeros((a.shape[1], ends[-1]), "float32"))
        seconds[shared[0]][:, end - b.shape[1] : end] = b
    return np.concatenate(firsts, axis=1), np.concatenate(seconds)
