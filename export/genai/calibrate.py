"""How layers are stored, by what they do with the user's own text."""

import concurrent.futures
import os
import tempfile
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from keras_peft.export.blockwise import Blockwise
from keras_peft.export.blockwise import Group
from keras_peft.export.blockwise import gptq
from keras_peft.export.blockwise import in_4_bits
from keras_peft.export.blockwise import quantize
from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.decoder import Linear
from keras_peft.export.genai.decoder import parts
from keras_peft.export.genai.observed import Observed
from keras_peft.export.genai.plan import LAYER_BLOCKS

# Tokens of a row, rows that are read, and the fewest that say anything.
LENGTH, MOST, FEWEST = 256, 24, 4
# Of the bytes that all layers in 4 bits take: what 8 bits may add where they
# help most.
EXTRA = 0.06


def calibration_rows(
    texts: Sequence[str], tokenizer: Path, context_length: int
) -> np.ndarray:
    """Rows of token ids, evenly spread over the texts, one after the other."""
    import tokenizers

    if isinstance(texts, str) or not all(isinstance(t, str) for t in texts):
        raise ValueError(
            "`calibration` is a list of texts, of the kind the model was "
            f"trained on. Received: calibration of type {type(texts).__name__}"
        )
    encode = tokenizers.Tokenizer.from_file(str(tokenizer)).encode
    length = min(LENGTH, context_length)
    ids = [id for text in texts for id in encode(text).ids]
    count = len(ids) // length
    if count < FEWEST:
        raise ValueError(
            f"`calibration` has {len(ids)} tokens, of which no statistics can "
            f"be taken: {FEWEST * length} is the least, and {MOST * length} "
            f"serves best. Pass more of the training texts. Received: "
            f"{len(texts)} texts"
        )
    rows = np.array(ids[: count * length]).reshape(count, length)
    return rows[np.linspace(0, count - 1, min(count, MOST)).astype(int)]


def calibrated(
    decoder: Decoder,
    rows: np.ndarray,
    context_length: int,
    fixed: Mapping[str, Blockwise],
    bits: int = 4,
) -> dict[str, Blockwise]:
    """`{key: kernel}` of the linear layers of which the inputs are known.

    All are rounded by GPTQ. Of those in 4 bits, the ones that lose most by it,
    as measured, go to 8, as far as 6 % more bytes reach.

    Args:
        decoder: What is stored.
        rows: Rows of token ids.
        context_length: As in `graph.build`.
        fixed: Layers that trained in their integers: these stay as they are.
        bits: 4 or 8.
    """
    kernels = {part.key: part.kernel for part in parts(decoder, Linear)}
    with tempfile.TemporaryDirectory() as folder:
        observed = Observed(decoder, context_length, Path(folder))
        grams = observed.grams(rows)
        names = [
            n for n, keys in observed.keys.items() if not fixed.keys() & keys
        ]

        def of(name: str) -> tuple[np.ndarray, np.ndarray]:
            kernel = _joined(kernels, observed.keys[name])
            return kernel, grams[observed.inputs[name]]

        block = LAYER_BLOCKS[bits]
        chosen = _each(names, lambda name: gptq(*of(name), bits, block))
        if bits == 4:
            large = {name: _in_8_bits(of(name)[0]) for name in names}
            chosen = _mixed(observed, chosen, large, rows)
    found: dict[str, Blockwise] = {}
    for name, whole in chosen.items():
        found |= _apart(whole, kernels, observed.keys[name])
    return found


def _each(
    names: Sequence[str], stored: Callable[[str], Blockwise]
) -> dict[str, Blockwise]:
    workers = min(4, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return dict(zip(names, pool.map(stored, names), strict=True))


def _in_8_bits(kernel: np.ndarray) -> Blockwise:
    # A grid fitted to the largest inputs was worse on real weights: it may
    # clip the weights of all others.
    return quantize(kernel, 8, LAYER_BLOCKS[8])


def _mixed(
    observed: Observed,
    small: Mapping[str, Blockwise],
    large: Mapping[str, Blockwise],
    rows: np.ndarray,
) -> dict[str, Blockwise]:
    """Kernels in 4 bits, and in 8 where that helps most."""
    groups = _groups(observed, small, large, rows)
    least = sum(group.bytes_at_4 for group in groups)
    fours = {
        name
        for group in in_4_bits(groups, int(least * (1 + EXTRA)))
        for name in group.paths
    }
    return {n: small[n] if n in fours else large[n] for n in small}


def _joined(
    kernels: Mapping[str, np.ndarray], keys: Sequence[str]
) -> np.ndarray:
    return np.concatenate([kernels[key] for key in keys], axis=1)


def _apart(
    whole: Blockwise, kernels: Mapping[str, np.ndarray], keys: Sequence[str]
) -> dict[str, Blockwise]:
    """A kernel that joins several, as the several."""
    ends = np.cumsum([kernels[key].shape[1] for key in keys])
    starts = [0, *ends[:-1]]
    return {
        key: whole.select(slice(start, end))
        for key, start, end in zip(keys, starts, ends, strict=True)
    }


def _groups(
    observed: Observed,
    small: Mapping[str, Blockwise],
    large: Mapping[str, Blockwise],
    rows: np.ndarray,
) -> list[Group]:
    """Each kernel with its loss at 4 bits: the divergence from float32."""
    row = rows[len(rows) // 2]
    exact = observed.log_probabilities(row)
    groups = []
    for name, stored in small.items():
        found = observed.log_probabilities(row, {name: stored.kernel()})
        loss = float((np.exp(exact) * (exact - found)).sum(axis=-1).mean())
        groups.append(Group((name,), stored.nbytes, large[name].nbytes, loss))
    return groups
