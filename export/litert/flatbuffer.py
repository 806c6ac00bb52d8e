"""A LiteRT file as objects that can be changed, and back."""

import hashlib
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

_IDENTIFIER = b"TFL3"
# Kernels read weights in blocks of this many bytes.
_ALIGNMENT = 16
# Offsets in the file are signed, and 32 bits wide.
LARGEST_FILE = 2**31 - 2**20

_DTYPES = {
    getattr(schema.TensorType, name.upper()): np.dtype(name)
    for name in ("float32", "float16", "int8", "int32", "int64", "bool")
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class _Builder(flatbuffers.Builder):
    """A builder that aligns arrays, which the original does for C++ only."""

    def CreateNumpyVector(self, array: np.ndarray) -> int:  # noqa: N802
        data = np.ascontiguousarray(array).view("uint8")
        self.StartVector(1, data.size, _ALIGNMENT)
        self.head = int(self.Head() - data.size)
        self.Bytes[self.Head() : self.Head() + data.size] = data.tobytes()
        return self.EndVector()


def read(content: bytes) -> Any:
    """The file as a tree of objects, as its schema has it."""
    return schema.ModelT.InitFromPackedBuf(content, 0)


def write(model: Any) -> bytes:
    """The file of a tree of objects; nothing is in it twice."""
    _share_buffers(model)
    size = sum(b.data.size for b in model.buffers if b.data is not None)
    if size > LARGEST_FILE:
        raise ValueError(
            "A LiteRT file ends at 2 GB. Store smaller weights with "
            "`quantize='int8'`, or export to ONNX. Received: "
            f"{size / 1e9:.1f} GB of weights"
        )
    builder = _Builder(size + 2**16)
    builder.Finish(model.Pack(builder), _IDENTIFIER)
    return bytes(builder.Output())


def array(model: Any, tensor: Any) -> np.ndarray | None:
    """The constant in `tensor`, or `None` where it is computed."""
    data = model.buffers[tensor.buffer].data
    if data is None or not len(data) or tensor.type not in _DTYPES:
        return None
    shape = [] if tensor.shape is None else tensor.shape
    return data.view(_DTYPES[tensor.type]).reshape(shape)


def set_array(model: Any, tensor: Any, content: np.ndarray) -> None:
    """Puts a constant into `tensor`, in a buffer of its own."""
    buffer = schema.BufferT()
    buffer.data = np.ascontiguousarray(content).reshape(-1).view("uint8")
    model.buffers.append(buffer)
    tensor.buffer = len(model.buffers) - 1
    tensor.type = _CODES[content.dtype]
    tensor.shape = np.array(content.shape, "int32")
    tensor.shapeSignature = None


def constant(model: Any, graph: Any, name: str, content: np.ndarray) -> int:
    """The position of a new constant in `graph`."""
    tensor = schema.TensorT(name=name)
    set_array(model, tensor, content)
    graph.tensors.append(tensor)
    return len(graph.tensors) - 1


def computed(graph: Any, like: Any, name: str, dtype: str) -> int:
    """The position of a new tensor of the shape of `like`."""
    tensor = schema.TensorT(name=name)
    tensor.shape, tensor.shapeSignature = like.shape, like.shapeSignature
    tensor.type = _CODES[np.dtype(dtype)]
    tensor.buffer = 0  # The first buffer is the empty one.
    graph.tensors.append(tensor)
    return len(graph.tensors) - 1


def operator(
    model: Any, name: str, inputs: list[int], outputs: list[int]
) -> Any:
    """A new operator without options."""
    made = schema.OperatorT()
    made.opcodeIndex = _code_index(model, name)
    made.inputs = np.array(inputs, "int32")
    made.outputs = np.array(outputs, "int32")
    return made


def kind(model: Any, node: Any) -> str:
    """What an operator is called, such as `"FULLY_CONNECTED"`."""
    return _NAMES[_code(model.operatorCodes[node.opcodeIndex])]


_NAMES = {
    number: name
    for name, number in vars(schema.BuiltinOperator).items()
    if isinstance(number, int)
}


def _code(entry: Any) -> int:
    # Older files have no room for numbers above 127 in the first field.
    return max(entry.builtinCode, entry.deprecatedBuiltinCode)


def _code_index(model: Any, name: str) -> int:
    wanted = getattr(schema.BuiltinOperator, name)
    for index, entry in enumerate(model.operatorCodes):
        if _code(entry) == wanted:
            return index
    entry = schema.OperatorCodeT()
    entry.builtinCode = wanted
    entry.deprecatedBuiltinCode = min(wanted, 127)
    entry.version = 1
    model.operatorCodes.append(entry)
    return len(model.operatorCodes) - 1


def _share_buffers(model: Any) -> None:
    """Keeps one buffer of each content, and none that nothing reads."""
    kept, places, seen = [model.buffers[0]], {0: 0}, {}

    def place(index: int) -> int:
        if index not in places:
            data = model.buffers[index].data
            content = b"" if data is None else data.tobytes()
            # Tensors that are computed must not share an entry by accident.
            digest = hashlib.sha256(content).digest() if content else index
            if digest not in seen:
                seen[digest] = len(kept)
                kept.append(model.buffers[index])
            places[index] = seen[digest]
        return places[index]

    for graph in model.subgraphs:
        for tensor in graph.tensors:
            tensor.buffer = place(tensor.buffer)
    for entry in model.metadata or []:
        entry.buffer = place(entry.buffer)
    model.buffers = kept
