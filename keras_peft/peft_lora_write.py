"""LoRA to PEFT's files."""

import math

import numpy as np

from keras_peft.hf_names import OUTPUT
from keras_peft.kernels import kernel_of
from keras_peft.peft_codec import is_embedding
from keras_peft.peft_codec import ranked_settings

# PEFT's names of `A` and `B`, of DoRA's norms, and of a bias of `B`.
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
LINEAR = ("lora_A.weight", "lora_B.weight")
MAGNITUDE = "lora_magnitude_vector"
BIAS = "lora_B.bias"


def write(writer):
    """`(settings, {module: {suffix: array}})`; notes what cannot be said."""
    method, modules, ranks, scales = writer.method, {}, {}, {}
    for module, parts in writer.modules.items():
        a, b, scales[module] = _combined(writer, parts)
        ranks[module] = a.shape[1]
        modules[module] = _tensors(writer, module, parts, a, b)
        if method.use_bias:
            modules[module][BIAS] = _bias(writer, parts, scales[module])
    _write_tied(writer, modules, ranks, scales)
    stabilized = method.scaling == "rank_stabilized"
    settings = ranked_settings(
        writer.names, ranks, scales, math.sqrt if stabilized else None
    )
    settings = {
        "lora_alpha": settings.pop("alpha"),
        "lora_dropout": method.dropout,
        "use_rslora": stabilized,
        "use_dora": method.decompose,
        "init_lora_weights": True,
        "bias": "none",
        "fan_in_fan_out": any(
            part.transposed and not is_embedding(writer.names.layers[path])
            for parts in writer.modules.values()
            for path, part in parts.items()
        ),
        **settings,
    }
    if method.use_bias:  # Versions of PEFT before 0.14 do not know it.
        settings["lora_bias"] = True
    return settings, modules


def _combined(writer, parts):
    """`(a, b, scale)` of a whole HF module from the layers it is made of.

    Layers with different `A` become blocks: their ranks add up.
    """
    pieces = []
    for path, part in parts.items():
        if path in writer.leaves:
            a, b = _low_rank(writer.weights(path))
            pieces.append((part, a, b, writer.method.scale_of(path)))
    scales = {scale for *_, scale in pieces}
    scale = scales.pop() if len(scales) == 1 else 1.0
    _, first, _, _ = pieces[0]
    shared = not scales and all(np.array_equal(a, first) for _, a, *_ in pieces)
    inputs, outputs = pieces[0][0].sizes
    rank = sum(p[1].shape[1] for p in pieces[: 1 if shared else None])
    whole_a = np.zeros((inputs, rank), "float32")
    whole_b = np.zeros((rank, outputs), "float32")
    start = 0
    for part, a, b, own in pieces:
        ranks = np.arange(start, start + a.shape[1])
        whole_a[np.ix_(part.inputs, ranks)] = a
        whole_b[np.ix_(ranks, part.outputs)] = b * np.float32(own / scale)
        start += 0 if shared else a.shape[1]
    return whole_a, whole_b, scale


def _low_rank(w):
    """`A` and `B`; a residual start takes as many ranks again."""
    a, b = w["lora_kernel_a"], w["lora_kernel_b"]
    if "lora_initial_a" in w:
        a = np.concatenate([a, w["lora_initial_a"]], axis=1)
        b = np.concatenate([b, -w["lora_initial_b"]], axis=0)
    return a, b


def _tensors(writer, module, parts, a, b):
    path, part = next(iter(parts.items()))
    layer, rank, taps = writer.names.layers[path], a.shape[1], part.shape[2:]
    if getattr(layer, "groups", 1) != 1:
        writer.wrong.append(f"`{path}` is a convolution in groups")
    first, second = suffixes(layer)
    ones = (1,) * len(taps)
    a_shape = (rank, part.shape[1], *taps) if taps else (rank, -1)
    tensors = {
        first: a.T.reshape(a_shape),
        second: b.T.reshape(-1, rank, *ones),
    }
    if writer.method.decompose:
        magnitude = _magnitude(writer, parts)
        shape = (1, -1, *ones) if taps else (-1,)
        tensors[MAGNITUDE] = magnitude.reshape(shape)
    return tensors


def _magnitude(writer, parts):
    """Of the whole module: an unadapted part keeps its own norms."""
    _, outputs = next(iter(parts.values())).sizes
    magnitude = np.zeros(outputs, "float32")
    for path, part in parts.items():
        if path in writer.leaves:
            own = writer.weights(path)["lora_magnitude"]
        else:
            kernel = kernel_of(writer.names.layers[path]).read()
            own = np.linalg.norm(kernel, axis=0)
        magnitude[part.outputs] = own
    return magnitude


def _bias(writer, parts, scale):
    """Of the whole module: zero for a part that is not adapted."""
    _, outputs = next(iter(parts.values())).sizes
    bias = np.zeros(outputs, "float32")
    for path, part in parts.items():
        if path in writer.leaves:
            own = np.float32(writer.method.scale_of(path) / scale)
            bias[part.outputs] = writer.weights(path)["lora_bias"] * own
    return bias


def _write_tied(writer, modules, ranks, scales):
    embedding = writer.names.tied
    if embedding not in modules:
        return
    if writer.method.decompose:
        writer.wrong.append(
            f"`{embedding}` is tied to the output, whose columns DoRA would "
            "scale in PEFT and whose rows it scales here"
        )
    first, second = (modules[embedding][key] for key in EMBEDDING)
    modules[OUTPUT] = dict(zip(LINEAR, (second.T, first.T), strict=True))
    ranks[OUTPUT], scales[OUTPUT] = ranks[embedding], scales[embedding]


def suffixes(layer):
    """The names of `A` and `B` for a layer."""
    return EMBEDDING if is_embedding(layer) else LINEAR
