"""LoRA from PEFT's files.

A module's `lora_A` is `(rank, inputs)` and its `lora_B` `(outputs, rank)`, the
transposes of `A` and `B` here. Fused modules share one `lora_A`; the layers
here that are parts of them have one `A` each.
"""

import math

import numpy as np

from keras_peft.hf_names import OUTPUT
from keras_peft.kernels import kernel_of
from keras_peft.methods.lora import LoRA
from keras_peft.peft_codec import COMMON
from keras_peft.peft_codec import ranked
from keras_peft.peft_lora_write import BIAS
from keras_peft.peft_lora_write import EMBEDDING
from keras_peft.peft_lora_write import LINEAR
from keras_peft.peft_lora_write import MAGNITUDE
from keras_peft.peft_lora_write import suffixes
from keras_peft.peft_lora_write import write as write  # Of a codec.

PEFT_TYPE = "LORA"
METHOD = LoRA
SUFFIXES = (*EMBEDDING, *LINEAR, MAGNITUDE, BIAS)
SHARED = ()
# Settings that `read` follows, or that only matter while PEFT trains.
KNOWN = (
    *COMMON,
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern"),
    *("use_rslora", "use_dora", "init_lora_weights", "ensure_weight_tying"),
    *("megatron_core", "qalora_group_size", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "velora_config", "bias", "lora_bias"),
)
# Starts that leave PEFT's base as it is; others change it.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")
_RESIDUAL_STARTS = ("pissa", "olora")


# -- Reading -----------------------------------------------------------------


def read(reader):
    """`(method, {path: {weight: array}})`; notes what is wrong."""
    start = _start(reader)
    scales, adapters = {}, {}
    _check_tied(reader)
    for module, tensors in reader.modules.items():
        if BIAS in tensors and not reader.config.get("lora_bias"):
            reader.wrong.append(
                f"`{module}.{BIAS}` is there without `lora_bias`"
            )
        if module == OUTPUT:
            continue
        parts = reader.parts(module)
        found = _read_module(reader, module, parts)
        if found is None:
            continue
        scale = _scale(reader, module, found["a"].shape[1])
        if start in _RESIDUAL_STARTS:
            found |= _start_values(reader, parts, start, found, scale)
        for path, weights in _split(found, parts).items():
            scales[path] = scale
            adapters[path] = weights
    if reader.wrong or not adapters:
        reader.wrong += [] if reader.wrong else ["it holds no tensors"]
        return None
    ranks = {p: w["lora_kernel_a"].shape[1] for p, w in adapters.items()}
    return _method(reader.config, start, ranks, scales), adapters


def _start(reader):
    start = reader.config.get("init_lora_weights", True)
    if reader.config.get("bias", "none") != "none":
        reader.wrong.append(
            f"it trained biases of the base (bias={reader.config['bias']!r})"
        )
    if reader.config.get("lora_bias") and reader.config.get("use_dora"):
        reader.wrong.append("`lora_bias` and `use_dora` exclude each other")
    if start in _PLAIN_STARTS:
        return "default"
    if start not in _RESIDUAL_STARTS:
        reader.wrong.append(
            f"it belongs to a base that PEFT changed (init_lora_weights="
            f"{start!r}); save it with PEFT's "
            "`path_initial_model_for_weight_conversion`"
        )
    return start


def _read_module(reader, module, parts):
    """`{"a": (inputs, rank), "b": (rank, outputs), ...}`, with what is on."""
    if not parts:
        return None
    part = next(iter(parts.values()))
    (inputs, outputs), taps = part.sizes, part.shape[2:]
    rank = reader.by_pattern("rank_pattern", module, "r")
    ones = (1,) * len(taps)
    a_shape = (rank, part.shape[1], *taps) if taps else (rank, inputs)
    first, second = suffixes(reader.names.layers[next(iter(parts))])
    a = reader.take(module, first, a_shape)
    b = reader.take(module, second, (outputs, rank, *ones))
    if a is None or b is None:
        return None
    found = {"a": a.reshape(rank, -1).T, "b": b.reshape(-1, rank).T}
    if reader.config.get("use_dora"):
        shape = (1, outputs, *ones) if taps else (outputs,)
        magnitude = reader.take(module, MAGNITUDE, shape)
        if magnitude is None:
            return None
        found["magnitude"] = magnitude.ravel()
    if reader.config.get("lora_bias"):
        bias = reader.take(module, BIAS, (outputs,))
        if bias is None:
            return None
        found["bias"] = bias
    return found


def _scale(reader, module, rank):
    alpha = reader.by_pattern("alpha_pattern", module, "lora_alpha")
    stabilized = reader.config.get("use_rslora")
    return alpha / (math.sqrt(rank) if stabilized else rank)


def _start_values(reader, parts, start, found, scale):
    """What PEFT took from the base when it began, as it does on each load.

    Both are unique up to signs that cancel in the product.
    """
    part = next(iter(parts.values()))
    kernel = np.zeros(part.sizes, "float32")
    for path, each in parts.items():
        own = kernel_of(reader.names.layers[path]).read()
        kernel[np.ix_(each.inputs, each.outputs)] = own
    rank = found["a"].shape[1]
    if start == "pissa":
        left, values, right = np.linalg.svd(kernel, full_matrices=False)
        root = np.sqrt(values[:rank] / scale)
        return {"a0": left[:, :rank] * root, "b0": root[:, None] * right[:rank]}
    q, r = np.linalg.qr(kernel.T)
    return {"a0": r[:rank].T, "b0": q[:, :rank].T}


def _split(found, parts):
    """`{path: weights}` of the layers that make up one module."""
    adapters = {}
    for path, part in parts.items():
        used = _used_ranks(found, part, len(parts))
        if not used.any():
            continue  # Nothing changes this part of the module.
        weights = {
            "lora_kernel_a": found["a"][part.inputs][:, used],
            "lora_kernel_b": found["b"][:, part.outputs][used],
        }
        if "a0" in found:
            weights["lora_initial_a"] = found["a0"][part.inputs]
            weights["lora_initial_b"] = found["b0"][:, part.outputs]
        for key in ("magnitude", "bias"):
            if key in found:
                weights[f"lora_{key}"] = found[key][part.outputs]
        adapters[path] = weights
    return adapters


def _used_ranks(found, part, count):
    """Which ranks of a module one of its `count` parts has.

    A fused module may hold one block of ranks for each of its parts.
    """
    whole = found["b"]
    every = np.full(len(whole), True)
    blocks = count > 1 and whole.any() and found.keys() <= {"a", "b", "bias"}
    if not blocks:
        return every
    used = whole[:, part.outputs].any(axis=1)
    moves = "bias" in found and found["bias"][part.outputs].any()
    return every if moves and not used.any() else used


def _method(config, start, ranks, scales):
    """A `LoRA` that gives each path its rank and its scale."""
    stabilized = bool(config.get("use_rslora"))
    return LoRA(
        dropout=config.get("lora_dropout", 0.0),
        scaling="rank_stabilized" if stabilized else "standard",
        init=start,
        decompose=bool(config.get("use_dora")),
        use_bias=bool(config.get("lora_bias")),
        **ranked(ranks, scales, math.sqrt if stabilized else None),
    )


# -- The output that is tied to an embedding ---------------------------------


def _check_tied(reader):
    """Here a tied matrix has one adapter; PEFT gives its two uses two."""
    embedding = reader.names.tied
    output = reader.modules.get(OUTPUT)
    if embedding is None:
        if output is not None:
            reader.wrong.append(
                f"`{OUTPUT}`: keras-hub keeps the output matrix inside of the "
                "embedding layer, where no adapter reaches it"
            )
        return
    tensors = reader.modules.get(embedding, {})
    turned = {
        first: tensors.get(second)
        for first, second in zip(LINEAR, EMBEDDING[::-1], strict=True)
    }
    same = output is not None and all(
        turned[key] is not None
        and key in output
        and np.allclose(output[key], turned[key].T, rtol=1e-5, atol=1e-8)
        for key in LINEAR
    )
    if (tensors or output is not None) and not same:
        reader.wrong.append(
            f"`{embedding}` and `{OUTPUT}` are one matrix in this model, and "
            "the adapter changes them differently"
        )
