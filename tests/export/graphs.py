"""Graphs written as text, for the tests of rewrites."""

import collections
import tempfile

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime


def graph(text, **constants):
    """A model from ONNX text, with constants for the names given."""
    header = '<ir_version: 10, opset_import: ["" : 20]>\n'
    model = ir.from_onnx_text(header + text)
    values = {v.name: v for n in model.graph for v in n.inputs if v is not None}
    for name, content in constants.items():
        tensor = ir.tensor(np.asarray(content), name=name)
        value = values[name]
        value.const_value = tensor
        value.shape, value.dtype = tensor.shape, tensor.dtype
        model.graph.register_initializer(value)
    return model


def ops(model):
    """How often each operator occurs."""
    return collections.Counter(node.op_type for node in model.graph)


def run(model, **inputs):
    """The first output, as the runtime gives it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, inputs)[0]


def fused(proto):
    """The graph that the runtime makes of another."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as name:
        path = f"{name}/fused.onnx"
        options.optimized_model_filepath = path
        onnxruntime.InferenceSession(
            proto.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
        )
        return onnx.load(path)


def fused_ops(model):
    """How often each operator occurs once the runtime has fused them."""
    nodes = fused(ir.to_proto(model)).graph.node
    return collections.Counter(node.op_type for node in nodes)


def random(*shape, seed=0):
    """Normal float32 numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype("float32")
