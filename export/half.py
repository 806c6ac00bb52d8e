"""Float32 graph -> float16 graph with float32 inputs and outputs."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def to_float16(graph: "onnx.ModelProto") -> "onnx.ModelProto":
    """A copy of the graph that stores and computes in float16.

    Half the bytes, for devices that compute in float16; on a processor that
    does not, it is no faster than float32. Inputs and outputs stay float32.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    return convert_float_to_float16(copy, keep_io_types=True)
