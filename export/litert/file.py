"""A LiteRT file in memory: its names, its runs and its rounding."""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from typing import ClassVar

import numpy as np

from keras_peft.export import comparison
from keras_peft.export.litert import decoder
from keras_peft.export.litert import flatbuffer
from keras_peft.export.litert.trace import SIGNATURE
from keras_peft.export.report import WeightError
from keras_peft.export.result import Forward
from keras_peft.export.result import TensorSpec

_PRODUCTS = (
    "BATCH_MATMUL",
    "CONV_2D",
    "CONV_3D",
    "DEPTHWISE_CONV_2D",
    "FULLY_CONNECTED",
    "TRANSPOSE_CONV",
    "UNIDIRECTIONAL_SEQUENCE_LSTM",
    "WHILE",
)


@dataclasses.dataclass(frozen=True)
class LiteRtFile:
    """A file as a runtime reads it.

    Attributes:
        content: The bytes of the file.
    """

    content: bytes

    name: ClassVar[str] = "model.tflite"
    format: ClassVar[str] = "LiteRT"
    runtime: ClassVar[str] = "LiteRT"
    packages: ClassVar[tuple[str, ...]] = ("ai-edge-litert", "tensorflow")

    @classmethod
    def read(cls, path: Path) -> "LiteRtFile":
        """The content of a file."""
        return cls(path.read_bytes())

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return len(self.content)

    def runner(self, threads: int = 1) -> Forward:
        """The file as a function, in the interpreter of this machine."""
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(
            model_content=self.content, num_threads=threads
        )
        if self.generates:
            return decoder.forward(interpreter)
        run = interpreter.get_signature_runner(SIGNATURE)
        names = [*run.get_input_details()]
        outputs = self.output_names()

        def forward(batch: Mapping[str, np.ndarray]) -> list[np.ndarray]:
            found = run(**{name: batch[name] for name in names})
            return [found[name] for name in outputs]

        return forward

    @property
    def generates(self) -> bool:
        """Whether the file decodes with a cache."""
        keys = {s.signatureKey.decode() for s in self.tree.signatureDefs}
        return keys == {decoder.PREFILL, decoder.DECODE}

    def output_names(self) -> list[str]:
        """The outputs, in the order of the model."""
        signature = self.tree.signatureDefs[0]
        return [entry.name.decode() for entry in signature.outputs]

    def admitted(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch as the file can take it: a cache knows no padding."""
        return decoder.without_padding(batch) if self.generates else dict(batch)

    def rounding_bound(self) -> float:
        """How far two correct float32 evaluations may be apart."""
        return comparison.rounding_of(
            [
                content.shape
                for index in node.inputs
                if index >= 0 and (content := graph.array(index)) is not None
            ]
            for graph in flatbuffer.graphs(self.tree)
            for node in graph.nodes
            if graph.kind(node) in _PRODUCTS
        )

    def weight_errors(self, exact: "LiteRtFile") -> tuple[WeightError, ...]:
        """How far each weight is from that of the float32 file."""
        stored = dict(_stored(self.tree))
        errors = {}
        for name, (weight, _) in _stored(exact.tree):
            value, dtype = stored.get(name, (weight, "float32"))
            if dtype == "float32" or weight.size == 1:
                continue
            change = float(np.linalg.norm((value - weight).ravel()))
            relative = change / max(float(np.linalg.norm(weight)), 1e-30)
            errors[name] = WeightError(name, weight.shape, relative, dtype)
        return tuple(sorted(errors.values(), key=lambda e: -e.relative))

    def write(self, folder: Path) -> None:
        """Writes the file."""
        (folder / self.name).write_bytes(self.content)

    def requirements(self) -> dict[str, Any]:
        """The operators that a runtime must have."""
        found = {
            graph.kind(node)
            for graph in flatbuffer.graphs(self.tree)
            for node in graph.nodes
        }
        signatures = {
            signature.signatureKey.decode(): {
                entry.name.decode(): self._shape(signature, entry)
                for entry in signature.inputs
            }
            for signature in self.tree.signatureDefs
        }
        return {"signatures": signatures, "operators": sorted(found)}

    def decoder_specs(self, side: str) -> tuple[TensorSpec, ...]:
        """The inputs or outputs of a prompt; none without a cache."""
        if not self.generates:
            return ()
        signature = self._signature(decoder.PREFILL)
        return tuple(
            decoder.spec(entry.name.decode(), self._shape(signature, entry))
            for entry in getattr(signature, side)
        )

    def _signature(self, key: str) -> Any:
        (found,) = (
            signature
            for signature in self.tree.signatureDefs
            if signature.signatureKey.decode() == key
        )
        return found

    def _shape(self, signature: Any, entry: Any) -> list[int]:
        """The shape of an input; -1 is a size that is free."""
        graph = self.tree.subgraphs[signature.subgraphIndex]
        tensor = graph.tensors[entry.tensorIndex]
        free = tensor.shapeSignature
        shape = tensor.shape if free is None else free
        return [] if shape is None else [int(size) for size in shape]

    @functools.cached_property
    def tree(self) -> Any:
        """The objects of the file, to be read only."""
        return flatbuffer.read(self.content)


def _stored(tree: Any) -> Iterator[tuple[str, tuple[np.ndarray, str]]]:
    """Weights by name: their values, and the type they are stored in."""
    for graph in flatbuffer.graphs(tree):
        scales = {
            graph.name(index).removesuffix("/scale"): graph.array(index)
            for index in range(len(graph.tensors))
            if graph.name(index).endswith("/scale")
        }
        for index, tensor in enumerate(graph.tensors):
            content, name = graph.array(index), graph.name(index)
            if content is None or content.dtype not in ("f4", "f2", "i1"):
                continue
            value = content.astype("float64")
            if content.dtype == "i1":
                factors = _factors(tensor, scales.get(name))
                if factors is None:
                    continue
                value *= factors
            yield name, (value, content.dtype.name)


def _factors(tensor: Any, scales: np.ndarray | None) -> np.ndarray | None:
    """What the integers of a tensor are multiplied by."""
    settings = tensor.quantization
    if settings is None or settings.scale is None:
        return scales
    shape = np.ones(len(tensor.shape), int)
    shape[settings.quantizedDimension] = -1
    return settings.scale.reshape(shape)


def name_interface(
    tree: Any, inputs: Sequence[str], outputs: Sequence[str]
) -> None:
    """Gives inputs and outputs the names and the order of the model.

    Args:
        tree: A file whose inputs are called `input_<position>`, and outputs
            likewise.
        inputs: Names of the inputs, by position.
        outputs: Names of the outputs, by position.
    """
    for signature in tree.signatureDefs:
        graph = tree.subgraphs[signature.subgraphIndex]
        for side, names in (("inputs", inputs), ("outputs", outputs)):
            entries = sorted(getattr(signature, side), key=_position)
            setattr(signature, side, entries)
            order = [entry.tensorIndex for entry in entries]
            setattr(graph, side, np.array(order, "int32"))
            for entry in entries:
                entry.name = names[_position(entry)]
                graph.tensors[entry.tensorIndex].name = entry.name


def _position(entry: Any) -> int:
    return int(entry.name.decode().rpartition("_")[2])


def name_weights(tree: Any, variables: Mapping[str, np.ndarray]) -> None:
    """Calls constants that are variables of the model by their paths.

    The converter folds and transposes kernels, and names what it gets after
    the operators it made it from.
    """
    paths: dict[bytes, str] = {}
    for path, value in variables.items():
        for form in _forms(value):
            paths.setdefault(_digest(form), path)
    for graph in flatbuffer.graphs(tree):
        for index, tensor in enumerate(graph.tensors):
            content = graph.array(index)
            if content is not None and content.size > 1:
                tensor.name = paths.get(_digest(content), tensor.name)


def _forms(value: np.ndarray) -> Iterator[np.ndarray]:
    """A kernel with its axes in the orders a converter may choose."""
    axes = range(value.ndim)
    turned = (tuple(axes[n:]) + tuple(axes[:n]) for n in axes)
    orders = itertools.permutations(axes) if value.ndim <= 3 else turned
    for order in orders:
        yield value.transpose(order)


def _digest(content: np.ndarray) -> bytes:
    return hashlib.sha256(content.tobytes()).digest()
