"""What an export returns: the graph, and everything measured about it."""

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any
from typing import ClassVar
from typing import Protocol

if TYPE_CHECKING:
    import onnx

    from keras_peft.export.litert.file import LiteRtFile
    from keras_peft.export.report import WeightError

# What a form of the model gives for a batch: its outputs, in order.
Forward = Callable[[Mapping[str, Any]], Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph.

    Attributes:
        name: The name a runtime feeds or reads.
        dtype: NumPy name of the element type, such as `"int32"`.
        shape: A size per axis, or the name of an axis whose size is free,
            such as `("batch", "sequence", 384)`.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclasses.dataclass(frozen=True)
class Verification:
    """How far a file, run by its runtime, is from the Keras model.

    Attributes:
        step: The file that was run: `"float32"`, `"float16"` or `"int8"`.
        shapes: The input shapes of every run, by input name. None of them is
            the shape the model was traced with.
        max_abs: Largest absolute difference over all outputs and runs.
        relative: Largest difference of an output over that output's largest
            magnitude.
        cosine: Smallest cosine between an output and its reference.
        tolerance: The bound on `relative` that was enforced, or `None` where
            the difference was only measured.
    """

    step: str
    shapes: tuple[Mapping[str, tuple[int, ...]], ...]
    max_abs: float
    relative: float
    cosine: float
    tolerance: float | None


@dataclasses.dataclass(frozen=True)
class FloatWeight:
    """A weight that a quantized file keeps in floating point, and why."""

    name: str
    shape: tuple[int, ...]
    num_bytes: int
    reason: str


class ModelFile(Protocol):
    """What a report and a folder need of a file, whatever runs it.

    Attributes:
        name: What the file is called in a folder.
        format: What its format is called.
        runtime: What runs it.
        packages: The packages that made it, for the manifest.
    """

    name: ClassVar[str]
    format: ClassVar[str]
    runtime: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]

    @property
    def num_bytes(self) -> int:
        """Size of the file."""

    def runner(self, threads: int = 1) -> Forward:
        """The file as a function, in the runtime of this machine."""

    def admitted(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch as the file can take it."""

    def rounding_bound(self) -> float:
        """How far two correct float32 evaluations may be apart."""

    def weight_errors(self, exact: Any) -> "tuple[WeightError, ...]":
        """How far each weight is from that of the float32 file."""

    def write(self, folder: Path) -> None:
        """Writes the file into a folder."""

    def requirements(self) -> dict[str, Any]:
        """What a runtime must be able to do, for the manifest."""


@dataclasses.dataclass(frozen=True)
class Result:
    """An exported, optimized and checked model, still in memory.

    Attributes:
        model: The file as asked for: quantized where `quantize` was given.
        float_model: The float32 file it was made from; the same object as
            `model` without `quantize`.
        quantize: `None`, `"float16"` or `"int8"`.
        inputs: The inputs, in the order of the file.
        outputs: The outputs, in the order of the file.
        tracer: What made the graph: `"torch"` or `"tensorflow"`.
        notes: Sentences a user should read, such as why another tracer than
            the preferred one was taken.
        verification: One entry per step, float32 first.
        weights_left_float: Weights of a quantized file that stay in
            floating point; empty without `quantize`.
        sizes: Bytes of the file per step, such as
            `{"float32": 90_900_000, "int8": 22_800_000}`.
    """

    model: Any
    float_model: Any
    quantize: str | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    tracer: str
    notes: tuple[str, ...]
    verification: tuple[Verification, ...]
    weights_left_float: tuple[FloatWeight, ...]
    sizes: Mapping[str, int]

    @property
    def file(self) -> "ModelFile":
        """`model` as a folder and a report need it."""
        return self.model

    @property
    def float_file(self) -> "ModelFile":
        """`float_model` likewise."""
        return self.float_model


@dataclasses.dataclass(frozen=True)
class OnnxResult(Result):
    """A `Result` whose files are ONNX graphs."""

    model: "onnx.ModelProto"
    float_model: "onnx.ModelProto"

    @property
    def file(self) -> "ModelFile":
        from keras_peft.export.onnx_file import OnnxFile

        return OnnxFile(self.model)

    @property
    def float_file(self) -> "ModelFile":
        from keras_peft.export.onnx_file import OnnxFile

        return OnnxFile(self.float_model)


@dataclasses.dataclass(frozen=True)
class LiteRtResult(Result):
    """A `Result` whose files are LiteRT files."""

    model: "LiteRtFile"
    float_model: "LiteRtFile"
