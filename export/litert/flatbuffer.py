"""A LiteRT file as objects that can be changed, and back."""

import hashlib
from collections import defaultdict
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
    """A builder that aligns weights, which the original does in C++ only."""

    def CreateNumpyVector(self, array: np.ndarray) -> int:  # noqa: N802
        if array.dtype != np.uint8:
            return super().CreateNumpyVector(array)
        self.StartVector(1, array.size, _ALIGNMENT)
        self.head = self.Head() - array.size
        self.Bytes[self.Head() : self.Head() + array.size] = array.tobytes()
        self.vectorNumElems = array.size
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


class Graph:
    """One of the graphs of a file, to be read and changed in place.

    Tensors go by their positions, which never change.
    """

    def __init__(self, model: Any, graph: Any) -> None:
        self.model = model
        self.tensors = graph.tensors
        self.nodes = graph.operators

    def kind(self, node: Any) -> str:
        """What an operator is called, such as `"FULLY_CONNECTED"`."""
        return _NAMES[_code(self.model.operatorCodes[node.opcodeIndex])]

    def name(self, index: int) -> str:
        """The name of a tensor."""
        name = self.tensors[index].name
        return name.decode() if isinstance(name, bytes) else name

    def uses(self) -> dict[int, list[tuple[Any, int]]]:
        """Where each tensor is read: operators, and positions there."""
        uses: dict[int, list[tuple[Any, int]]] = defaultdict(list)
        for node in self.nodes:
            for position, index in enumerate(node.inputs):
                uses[index].append((node, position))
        return uses

    def array(self, index: int) -> np.ndarray | None:
        """The constant in a tensor, or `None` where it is computed."""
        tensor = self.tensors[index]
        data = self.model.buffers[tensor.buffer].data
        if data is None or not data.size or tensor.type not in _DTYPES:
            return None
        shape = [] if tensor.shape is None else tensor.shape
        return data.view(_DTYPES[tensor.type]).reshape(shape)

    def set_array(self, index: int, content: np.ndarray) -> None:
        """Puts a constant into a tensor, in a buffer of its own."""
        data = np.ascontiguousarray(content).reshape(-1).view("uint8")
        self.model.buffers.append(schema.BufferT(data=data))
        tensor = self.tensors[index]
        tensor.buffer = len(self.model.buffers) - 1
        tensor.type = _CODES[content.dtype]
        tensor.shape = np.array(content.shape, "int32")
        tensor.shapeSignature = None

    def constant(self, name: str, content: np.ndarray) -> int:
        """A new tensor with a constant."""
        self.tensors.append(schema.TensorT(name=name))
        self.set_array(len(self.tensors) - 1, content)
        return len(self.tensors) - 1

    def computed(
        self, name: str, dtype: str, like: int, width: int | None = None
    ) -> int:
        """A new tensor in the shape of another, of some last size."""
        tensor = schema.TensorT(name=name, type=_CODES[np.dtype(dtype)])
        for field in ("shape", "shapeSignature"):
            shape = getattr(self.tensors[like], field)
            if shape is not None and width is not None:
                shape = np.array([*shape[:-1], width], "int32")
            setattr(tensor, field, shape)
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def operator(
        self, kind: str, inputs: list[int], output: int, options: Any = None
    ) -> Any:
        """A new operator, not yet among the others."""
        made = schema.OperatorT(opcodeIndex=_code_index(self.model, kind))
        made.inputs = np.array(inputs, "int32")
        made.outputs = np.array([output], "int32")
        if options is not None:
            name = type(options).__name__.removesuffix("T")
            made.builtinOptionsType = getattr(schema.BuiltinOptions, name)
            made.builtinOptions = options
        return made


def graphs(model: Any) -> list[Graph]:
    """The graphs of a file: one per signature, and bodies of loops."""
    return [Graph(model, graph) for graph in model.subgraphs]


_NAMES = {
    number: name
    for name, number in vars(schema.BuiltinOperator).items()
    if isinstance(number, int)
}


def _code(entry: Any) -> int:
    # Older files have no room for numbers above 127 in the first field.
    return max(entry.builtinCode, entry.deprecatedBuiltinCode)


def _code_index(model: Any, kind: str) -> int:
    wanted = getattr(schema.BuiltinOperator, kind)
    for index, entry in enumerate(model.operatorCodes):
        if _code(entry) == wanted:
            return index
    code = schema.OperatorCodeT(
        deprecatedBuiltinCode=min(wanted, 127), builtinCode=wanted, version=1
    )
    model.operatorCodes.append(code)
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
