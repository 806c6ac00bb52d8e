"""LoHa in PEFT's files: `(w1_a @ w1_b) * (w2_a @ w2_b)`, outputs first."""

import numpy as np

from keras_peft.methods.loha import LoHa
from keras_peft.peft_codec import COMMON
from keras_peft.peft_codec import is_embedding
from keras_peft.peft_codec import ranked
from keras_peft.peft_codec import ranked_settings

PEFT_TYPE = "LOHA"
METHOD = LoHa
SUFFIXES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
SHARED = ()
# Dropouts are for training only.
KNOWN = (
    *COMMON,
    *("r", "alpha", "rank_pattern", "alpha_pattern", "init_weights"),
    *("rank_dropout", "module_dropout"),
)


def read(reader):
    """`(method, {path: {weight: array}})`; notes what is wrong."""
    ranks, scales, adapters = {}, {}, {}
    for module in reader.modules:
        parts = reader.parts(module)
        if not parts:
            continue
        inputs, outputs = next(iter(parts.values())).sizes
        rank = reader.by_pattern("rank_pattern", module, "r")
        alpha = reader.by_pattern("alpha_pattern", module, "alpha")
        shapes = [(outputs, rank), (rank, inputs)] * 2
        found = [
            reader.take(module, suffix, shape)
            for suffix, shape in zip(SUFFIXES, shapes, strict=True)
        ]
        if any(tensor is None for tensor in found):
            continue
        out1, in1, out2, in2 = found
        for path, part in parts.items():
            ranks[path], scales[path] = rank, alpha / rank
            adapters[path] = {
                "loha_a1": in1.T[part.inputs],
                "loha_b1": out1.T[:, part.outputs],
                "loha_a2": in2.T[part.inputs],
                "loha_b2": out2.T[:, part.outputs],
            }
    if reader.wrong:
        return None
    return LoHa(**ranked(ranks, scales)), adapters


def write(writer):
    """`(settings, {module: {suffix: array}})`; notes what cannot be said."""
    modules, ranks, scales = {}, {}, {}
    for module, parts in writer.modules.items():
        (path, part), *others = parts.items()
        layer = writer.names.layers[path]
        if others or part.transposed or is_embedding(layer):
            writer.wrong.append(
                f"PEFT has no LoHa for what `{module}` is, an embedding or a "
                "`Conv1D`"
            )
            continue
        weights = writer.weights(path)
        ranks[module] = writer.method.rank_of(path)
        scales[module] = writer.method.scale_of(path)
        modules[module] = {
            "hada_w1_a": _placed(weights["loha_b1"].T, part.outputs),
            "hada_w1_b": _placed(weights["loha_a1"], part.inputs).T,
            "hada_w2_a": _placed(weights["loha_b2"].T, part.outputs),
            "hada_w2_b": _placed(weights["loha_a2"], part.inputs).T,
        }
    if writer.wrong:
        return None
    return ranked_settings(writer.names, ranks, scales), modules


def _placed(rows, places):
    """The rows in the order of the HF module."""
    whole = np.zeros_like(rows)
    whole[places] = rows
    return whole
