"""Mixtures of experts as operators of ONNX Runtime."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from keras_peft.export.blockwise import Blockwise
from keras_peft.export.blockwise import concatenate
from keras_peft.export.genai.decoder import Experts
from keras_peft.export.genai.decoder import Linear
from keras_peft.export.genai.linear import INT8_INPUTS
from keras_peft.export.genai.linear import as_float
from keras_peft.export.genai.linear import form
from keras_peft.export.genai.linear import linear
from keras_peft.export.genai.writer import Writer

# The operators' one activation with a gate is `x * sigmoid(alpha * x)`.
ALPHAS = {"silu": 1.0, "quick_gelu": 1.702}

# Of each expert, the layers that share their inputs: their outputs alternate.
Bank = Sequence[tuple[Linear, ...]]


def chosen_experts(writer: Writer, layer: Experts, x: ir.Value) -> ir.Value:
    """What each token's experts make of it, weighted and summed.

    Only those that a token chose are computed.
    """
    into = [(expert.gate, expert.up) for expert in layer.experts if expert.gate]
    out = [(expert.down,) for expert in layer.experts]
    stored = _storage(writer, [part for each in into + out for part in each])
    path = layer.experts[0].down.path
    banks = ((f"{path}.in", into), (f"{path}.out", out))
    scores = linear(writer, x, layer.router)
    rows = writer.reshape(scores, -1, len(layer.experts))
    if isinstance(stored, Blockwise):
        (b1, s1, z1, c1), (b2, s2, z2, c2) = (
            _integers(writer, *bank) for bank in banks
        )
        third = (None, None, None)
        found = writer.fused(
            "QMoE",
            *(x, rows, b1, s1, c1, b2, s2, c2, *third, z1, z2),
            expert_weight_bits=stored.bits,
            block_size=stored.block_size,
            accuracy_level=INT8_INPUTS,
            **_attributes(layer),
        )
    else:
        tensors = [t for bank in banks for t in _floats(writer, *bank)]
        found = writer.fused("MoE", x, rows, *tensors, **_attributes(layer))
    return found if layer.normalized else _scaled(writer, layer, found, scores)


def _scaled(
    writer: Writer, layer: Experts, outputs: ir.Value, scores: ir.Value
) -> ir.Value:
    """Outputs by the share of all experts that the chosen ones have.

    The operators are always told to let the shares of the chosen sum to 1.
    Without, the `MoE` of ONNX Runtime 1.31 gives zeros where its outputs
    take the place of its inputs.
    """
    shares = writer.op("Softmax", scores, axis=-1)
    count = writer.integers(layer.per_token)
    shares, _ = writer.op("TopK", shares, count, outputs=2, axis=-1)
    total = writer.op("ReduceSum", shares, writer.integers(-1), keepdims=1)
    return writer.op("Mul", outputs, total)


def _storage(writer: Writer, parts: Sequence[Linear]) -> Any:
    """How all of these are stored: the operators know no two ways."""
    stored = [writer.stored(part.key) for part in parts]
    if len({form(each) for each in stored}) > 1:
        raise ValueError(
            "The experts of a mixture lie in one tensor, so all are stored "
            f"alike: choose one storage for {parts[0].path!r}. Received: "
            f"{sorted({form(each) for each in stored}, key=str)}"
        )
    size = getattr(stored[0], "block_size", 1)
    sizes = {part.kernel.shape[0] for part in parts}
    if any(inputs % size for inputs in sizes):
        raise ValueError(
            "Blocks of experts must divide their inputs: choose a smaller "
            f"`block_size` for {parts[0].path!r}. Received: block_size={size}, "
            f"inputs={sorted(sizes)}"
        )
    return stored[0]


def _attributes(layer: Experts) -> dict[str, Any]:
    """How an expert computes: all of them alike."""
    found = {
        "k": layer.per_token,
        "normalize_routing_weights": 1,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,  # Outputs of gate and up alternate.
        "activation_alpha": ALPHAS[layer.experts[0].activation],
        "activation_beta": float(layer.offset),
    }
    if layer.limit is not None:
        found["swiglu_limit"] = float(layer.limit)
    return found


# -- Tensors -----------------------------------------------------------------


def _floats(writer: Writer, name: str, bank: Bank) -> tuple[ir.Value, ...]:
    """`(kernels, biases)`."""
    kernels = as_float(
        writer,
        f"{name}.kernel",
        lambda: np.stack([_mixed([p.kernel.T for p in each]) for each in bank]),
        writer.stored(bank[0][0].key),
    )
    return kernels, _biases(writer, name, bank)


def _integers(
    writer: Writer, name: str, bank: Bank
) -> tuple[ir.Value | None, ...]:
    """`(values, scales, zero points, biases)`."""
    whole = concatenate([_blocks(writer, each) for each in bank])
    tensors = {
        kind: tensor.reshape(len(bank), whole.outputs // len(bank), -1)
        for kind, tensor in whole.tensors().items()
    }
    found = [
        writer.constant(f"{name}.kernel.{kind}", tensors[kind])
        if kind in tensors
        else None
        for kind in ("B", "scales", "zero_points")
    ]
    return *found, _biases(writer, name, bank)


def _blocks(writer: Writer, layers: tuple[Linear, ...]) -> Blockwise:
    stored = [writer.stored(layer.key) for layer in layers]
    arrays = {
        name: _mixed([getattr(each, name) for each in stored])
        for name in ("values", "scales", "zero_points")
    }
    return dataclasses.replace(stored[0], **arrays)


def _biases(writer: Writer, name: str, bank: Bank) -> ir.Value | None:
    """Those of a bank: all of its layers have one, or none."""
    biases = [
        _mixed([part.bias for part in each if part.bias is not None])
        for each in bank
        if each[0].bias is not None
    ]
    return writer.constant(f"{name}.bias", np.stack(biases)) if biases else None


def _mixed(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The first rows of all, their second rows, and so on."""
    return np.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])
