"""A graph has the operators that its architecture asks for, and no more."""

import collections
import dataclasses
import functools
import re

import graphs
import keras
import model_table
import numpy as np
import onnx
import pytest

from keras_peft.export import build
from keras_peft.export.checks import prepare_checks

NORMS = (
    "LayerNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
)
# QuickGelu with a factor of 1 is the SiLU of Llama.
ACTIVATIONS = ("BiasGelu", "FastGelu", "Gelu", "QuickGelu")
PRODUCTS = ("FusedGemm", "FusedMatMul", "Gemm", "MatMul")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What `num_layers` blocks are made of, and what stands around them.

    A block has two normalizations, one attention and one activation; one
    normalization more stands before or behind all blocks.
    """

    dense: int = 6
    dense_around: int = 0
    # Operators of an attention between its projections, beyond the usual.
    more: int = 0


ARCHITECTURES = {
    "bert": Architecture(dense_around=1),
    "roberta": Architecture(),
    "distil_bert": Architecture(),
    "vit_classifier": Architecture(dense_around=1),
    "gpt2": Architecture(dense_around=1),
    # Queries and keys turn (Split, Neg, Concat, two products, a sum), and
    # two heads share a key and a value (Unsqueeze, Expand, Reshape).
    "llama": Architecture(dense=7, dense_around=1, more=2 * 6 + 2 * 3),
}
LAYERS = 2
TORCH = [(name, "torch") for name in ARCHITECTURES]
TENSORFLOW = [
    (name, "tensorflow")
    for name in ("roberta", "distil_bert", "vit_classifier")
]
QUICK = [("bert", "torch"), ("llama", "torch")]
TABLE = [
    pytest.param(*row, marks=() if row in QUICK else pytest.mark.slow)
    for row in TORCH + TENSORFLOW
]
every_architecture = pytest.mark.parametrize(("name", "tracer"), TABLE)


@dataclasses.dataclass(frozen=True)
class Graphs:
    file: onnx.ModelProto
    # What the runtime makes of the file.
    fused: onnx.ModelProto
    variables: set[str]
    axes: set[str]


@functools.cache
def traced(name, tracer):
    model = model_table.make(name)
    rng = np.random.default_rng(0)
    for variable in model.variables:
        # Initial kernels of one shape are all the same in some layers.
        value = keras.ops.convert_to_numpy(variable)
        if value.dtype.kind == "f":
            noise = rng.normal(size=value.shape, scale=0.02)
            variable.assign(value + noise.astype(value.dtype))
    checks = prepare_checks(model, None)
    file = build._traced(checks, tracer)
    sizes = [s for i in checks.signature.inputs for s in i.shape]
    return Graphs(
        file,
        graphs.fused(file),
        {variable.path for variable in model.variables},
        {size for size in sizes if isinstance(size, str)},
    )


def count(graph, ops):
    return sum(node.op_type in ops for node in graph.graph.node)


def constants(graph):
    return {
        i.name: onnx.numpy_helper.to_array(i) for i in graph.graph.initializer
    }


@every_architecture
def test_every_layer_is_its_own_operator(name, tracer):
    architecture, fused = ARCHITECTURES[name], traced(name, tracer).fused
    dense = architecture.dense * LAYERS + architecture.dense_around
    assert count(fused, NORMS) == 2 * LAYERS + 1
    assert count(fused, ACTIVATIONS) == LAYERS
    # An attention multiplies queries by keys, and weights by values.
    assert count(fused, PRODUCTS) == dense + 2 * LAYERS
    assert count(fused, ("Softmax",)) == LAYERS


@every_architecture
def test_little_stands_between_the_layers(name, tracer):
    architecture, fused = ARCHITECTURES[name], traced(name, tracer).fused
    dense = architecture.dense * LAYERS + architecture.dense_around
    # Two products, softmax, two operators for the mask, and four times a
    # Transpose and a Reshape.
    attention = 13 + architecture.more
    # Embeddings, positions and masks, made once.
    around = 25
    bound = (
        2 * dense  # A product and a bias.
        + LAYERS * attention
        + 3 * (2 * LAYERS + 1)  # A normalization, a sum and a Reshape.
        + LAYERS
        + around
    )
    assert len(fused.graph.node) <= bound


@every_architecture
def test_nothing_is_left_for_the_runtime_to_fold(name, tracer):
    graph = traced(name, tracer)
    for proto in (graph.file, graph.fused):
        assert not count(proto, ("Einsum",))
        made_by = {o: n for n in proto.graph.node for o in n.output}
        for node in proto.graph.node:
            before = made_by.get(node.input[0]) if node.input else None
            if node.op_type == "Cast" and before is not None:
                assert before.op_type != "Cast"
    turned = [n for n in graph.fused.graph.node if n.op_type == "Transpose"]
    assert not {n.input[0] for n in turned} & set(constants(graph.fused))


@every_architecture
def test_every_constant_is_stored_once_under_a_name_of_the_model(name, tracer):
    graph = traced(name, tracer)
    stored = constants(graph.file)
    contents = collections.Counter(
        (a.dtype.str, a.shape, a.tobytes()) for a in stored.values()
    )
    assert set(contents.values()) == {1}
    for constant, content in stored.items():
        if content.dtype.kind == "f" and content.size > 16:
            # A number stands behind the path of a second form of a weight.
            path = re.sub(r"_\d+$", "", constant)
            assert {constant, path} & graph.variables


@every_architecture
def test_every_axis_has_a_name_of_the_model(name, tracer):
    graph = traced(name, tracer)
    axes = {
        dim.dim_param
        for value in (*graph.file.graph.input, *graph.file.graph.output)
        for dim in value.type.tensor_type.shape.dim
        if dim.HasField("dim_param")
    }
    assert axes <= graph.axes
