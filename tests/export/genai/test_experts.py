"""Mixtures of experts, of which only those are computed that a token chose."""

import dataclasses

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from keras_peft.export.blockwise import quantize
from keras_peft.export.genai.decoder import Experts
from keras_peft.export.genai.decoder import FeedForward
from keras_peft.export.genai.decoder import Linear
from keras_peft.export.genai.decoder import parts
from keras_peft.export.genai.experts import chosen_experts
from keras_peft.export.genai.graph import IR_VERSION
from keras_peft.export.genai.graph import OPSET
from keras_peft.export.genai.storage import Float
from keras_peft.export.genai.writer import MICROSOFT
from keras_peft.export.genai.writer import Writer

HIDDEN, INNER, EXPERTS, CHOSEN = 64, 96, 5, 2
TOKENS = np.random.default_rng(1).normal(size=(2, 7, HIDDEN)).astype("float32")
# Float32 sums of some hundred products, in another order.
EXACT = 1e-5
# In 8 bits the operator rounds its inputs, too, by up to 1/254 of the largest
# in a block: once for gate and up, which are multiplied, and once for down.
# The largest of 64 normal inputs is 2.5 times their mean, and errors of
# different inputs mostly cancel.
ROUNDED = 4 / 127

LIKE_MIXTRAL = dict(activation="silu")
LIKE_GPT_OSS = dict(
    activation="quick_gelu", limit=1.5, offset=1.0, has_bias=True
)
LIKE_QWEN = dict(activation="silu", normalized=False)
kinds = pytest.mark.parametrize("kind", [LIKE_MIXTRAL, LIKE_GPT_OSS, LIKE_QWEN])


def _mixture(activation, has_bias=False, inner=INNER, **rest):
    rng = np.random.default_rng(0)

    def linear(part, inputs, outputs, path="bank"):
        kernel = rng.normal(0, inputs**-0.5, (inputs, outputs))
        bias = rng.normal(size=outputs).astype("float32") if has_bias else None
        return Linear(path, kernel.astype("float32"), bias, part=part)

    experts = tuple(
        FeedForward(
            gate=linear(f"{index}.gate", HIDDEN, inner),
            up=linear(f"{index}.up", HIDDEN, inner),
            down=linear(f"{index}.down", inner, HIDDEN),
            activation=activation,
        )
        for index in range(EXPERTS)
    )
    router = linear("", HIDDEN, EXPERTS, path="router")
    return Experts(router, experts, CHOSEN, **rest)


def _expected(layer, x):
    """By its definition, each token and each of its experts by itself."""
    found = np.zeros_like(x)
    for place in np.ndindex(x.shape[:2]):
        scores = _apply(layer.router, x[place])
        shares = np.exp(scores) / np.exp(scores).sum()
        chosen = np.argsort(-shares)[: layer.per_token]
        total = shares[chosen].sum() if layer.normalized else 1.0
        for index in chosen:
            y = _expert(layer, layer.experts[index], x[place])
            found[place] += shares[index] / total * y
    return found


def _expert(layer, expert, x):
    gate, up = _apply(expert.gate, x), _apply(expert.up, x)
    if layer.limit is not None:
        gate = np.minimum(gate, layer.limit)
        up = np.clip(up, -layer.limit, layer.limit)
    alpha = {"silu": 1.0, "quick_gelu": 1.702}[expert.activation]
    gated = gate / (1 + np.exp(-alpha * gate))
    return _apply(expert.down, gated * (up + layer.offset))


def _apply(linear, x):
    y = x @ linear.kernel
    return y if linear.bias is None else y + linear.bias


def _run(layer, plan, accuracy_level=1):
    """The mixture between two operators, as it stands in a decoder."""
    writer = Writer(plan)
    shape = ir.Shape(["batch", "tokens", HIDDEN])
    x = ir.Value(name="x", shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
    inner = writer.op("Mul", x, writer.number(1.0))
    y = writer.op("Neg", chosen_experts(writer, layer, inner))
    y.name, y.type, y.shape = "y", x.type, shape
    for node in writer.tape.nodes:
        if node.op_type == "QMoE":
            level = ir.AttrInt64("accuracy_level", accuracy_level)
            node.attributes["accuracy_level"] = level
    graph = ir.Graph(
        [x],
        [y],
        nodes=writer.tape.nodes,
        initializers=writer.tape.initializers,
        opset_imports={"": OPSET, MICROSOFT: 1},
        name="mixture",
    )
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return -session.run(None, {"x": TOKENS})[0]


def _quantized(part, bits, rng=None):
    stored = quantize(part.kernel, bits)
    if rng is None:
        return stored
    zero_points = rng.integers(0, 2**bits, stored.zero_points.shape)
    return dataclasses.replace(stored, zero_points=zero_points.astype("uint8"))


def _bank(layer):
    return [part for part in parts(layer, Linear) if part.path == "bank"]


def _rounded(layer, plan):
    """The mixture with the kernels that its plan stands for."""

    def rounded(part):
        return dataclasses.replace(part, kernel=plan[part.key].kernel())

    experts = tuple(
        dataclasses.replace(
            expert,
            gate=rounded(expert.gate),
            up=rounded(expert.up),
            down=rounded(expert.down),
        )
        for expert in layer.experts
    )
    return dataclasses.replace(layer, experts=experts)


def _error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@kinds
def test_experts_compute_their_definition(kind):
    layer = _mixture(**kind)
    assert _error(_run(layer, {}), _expected(layer, TOKENS)) <= EXACT


@kinds
@pytest.mark.parametrize("moved", [False, True], ids=["middle", "moved"])
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_stand_for_their_kernels(kind, bits, moved):
    layer = _mixture(**kind)
    rng = np.random.default_rng(2) if moved else None
    plan = {part.key: _quantized(part, bits, rng) for part in _bank(layer)}
    expected = _expected(_rounded(layer, plan), TOKENS)
    bound = EXACT if bits == 4 else ROUNDED
    assert _error(_run(layer, plan), expected) <= bound
    assert _error(_run(layer, plan, accuracy_level=4), expected) <= ROUNDED


@kinds
def test_float16_rounds_the_weights_alone(kind):
    layer = _mixture(**kind)
    halves = {part.key: _Half(part) for part in _bank(layer)}
    expected = _expected(_rounded(layer, halves), TOKENS)
    plan = dict.fromkeys(halves, Float("float16"))
    assert _error(_run(layer, plan), expected) <= EXACT


class _Half:
    def __init__(self, part):
        self.kernel = lambda: part.kernel.astype("float16").astype("float32")


def test_experts_that_are_not_stored_alike_are_refused():
    layer = _mixture(**LIKE_MIXTRAL)
    plan = {part.key: _quantized(part, 8) for part in _bank(layer)}
    last = layer.experts[-1].down
    with pytest.raises(ValueError, match="all are stored alike.*Received"):
        _run(layer, plan | {last.key: _quantized(last, 4)})
    with pytest.raises(ValueError, match="all are stored alike.*float32"):
        _run(layer, {key: each for key, each in plan.items() if "0." in key})


def test_blocks_that_do_not_divide_the_inputs_are_refused():
    layer = _mixture(**LIKE_MIXTRAL, inner=72)
    plan = {part.key: _quantized(part, 8) for part in _bank(layer)}
    with pytest.raises(ValueError, match=r"smaller `block_size`.*\[64, 72\]"):
        _run(layer, plan)
