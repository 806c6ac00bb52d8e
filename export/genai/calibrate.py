"""How layers are stored, by what they do with the user's own text."""

import concurrent.futures
import os
import tempfile
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from keras_peft.export.blockwise import Blockwise
from keras_peft.export.blockwise import Group
from keras_peft.export.blockwise import gptq
from keras_peft.export.blockwise import in_4_bits
from keras_peft.export.blockwise import search
from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.decoder import Linear
from keras_peft.export.genai.decoder import parts
from keras_peft.export.genai.observed import Observed

# Tokens of a row, rows that are read, and the fewest that say anything.
LENGTH, MOST, FEWEST = 256, 24, 4
# Of the bytes that all layers in 4 bits take: what 8 bits may add where they
# help most.
EXTRA = 0.09


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
) -> dict[str, Blockwise]:
    """`{key: kernel}` of the linear layers of which the inputs are known.

    All go to 4 bits by GPTQ, but for those that lose most by it, as measured:
    they stay at 8 bits, as far as 9 % more bytes reach.

    Args:
        decoder: What is stored.
        rows: Rows of token ids.
        context_length: As in `graph.build`.
        fixed: Layers that trained in their integers: these stay as they are.
    """
    kernels = {part.key: part.kernel for part in parts(decoder, Linear)}
    with tempfile.TemporaryDirectory() as folder:
        observed = Observed(decoder, context_length, Path(folder))
        grams = observed.grams(rows)
        names = [
            n for n, keys in observed.keys.items() if not fixed.keys() & keys
        ]

        def stored(name: str) -> tuple[Blockwise, Blockwise]:
            kernel = _joined(kernels, observed.keys[name])
            gram = grams[observed.inputs[name]]
            large = search(kernel, 8, importance=np.diagonal(gram))
            return gptq(kernel, gram, 4), large

        workers = min(4, os.cpu_count() or 1)
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            both = dict(zip(names, pool.map(stored, names), strict=True))
        groups = _groups(observed, both, rows)
    least = sum(group.bytes_at_4 for group in groups)
    small = {
        name
        for group in in_4_bits(groups, int(least * (1 + EXTRA)))
        for name in group.paths
    }
    found: dict[str, Blockwise] = {}
    for name, (at_4, at_8) in both.items():
        whole = at_4 if name in small else at_8
        found |= _apart(whole, kernels, observed.keys[name])
    return found


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
    both: Mapping[str, tuple[Blockwise, Blockwise]],
    rows: np.ndarray,
) -> list[Group]:
    """Each kernel with its loss at 4 bits: the divergence from float32."""
    row = rows[len(rows) // 2]
    exact = observed.log_probabilities(row)
    groups = []
    for name, (small, large) in both.items():
        found = observed.log_probabilities(row, {name: small.kernel()})
        loss = float((np.exp(exact) * (exact - found)).sum(axis=-1).mean())
        groups.append(Group((name,), small.nbytes, large.nbytes, loss))
    return groups
