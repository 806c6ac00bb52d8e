"""A kernel in blocks, run by ONNX Runtime's own operator."""

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper
from onnx import numpy_helper


def multiply(stored, inputs, accuracy_level=1):
    """`inputs @ kernel`, where the runtime reads the kernel from `stored`."""
    tensors = stored.tensors()
    node = helper.make_node(
        "MatMulNBits",
        ["inputs", *tensors],
        ["outputs"],
        domain="com.microsoft",
        K=stored.inputs,
        N=stored.outputs,
        bits=stored.bits,
        block_size=stored.block_size,
        accuracy_level=accuracy_level,
    )
    floats = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "kernel",
        [helper.make_tensor_value_info("inputs", floats, ["n", stored.inputs])],
        [helper.make_tensor_value_info("outputs", floats, None)],
        [numpy_helper.from_array(v, k) for k, v in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21)]
    opsets.append(helper.make_opsetid("com.microsoft", 1))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"]
    )
    (outputs,) = session.run(None, {"inputs": inputs.astype(np.float32)})
    return outputs
