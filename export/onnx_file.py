"""An ONNX graph as a file that a report and a folder are made of."""

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any
from typing import ClassVar

from keras_peft.export import comparison
from keras_peft.export import measure
from keras_peft.export.report import WeightError
from keras_peft.export.result import Forward

if TYPE_CHECKING:
    import onnx

# A protocol buffer ends at 2 GB; weights then go to a file beside it.
LARGEST_MESSAGE = 2**31 - 2**20
# First ONNX Runtime that reads an opset, and one that reads an IR version.
RUNTIME_OF_OPSET = {
    17: "1.12",
    18: "1.14",
    19: "1.16",
    20: "1.17",
    21: "1.18",
    22: "1.21",
    23: "1.23",
}
RUNTIME_OF_IR = {8: "1.10", 9: "1.16", 10: "1.18", 11: "1.21", 12: "1.23"}


@dataclasses.dataclass(frozen=True)
class OnnxFile:
    """See `keras_peft.export.result.ModelFile`."""

    graph: "onnx.ModelProto"

    name: ClassVar[str] = "model.onnx"
    format: ClassVar[str] = "ONNX"
    runtime: ClassVar[str] = "ONNX Runtime"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime")

    @classmethod
    def read(cls, path: Path) -> "OnnxFile":
        """The graph in a file, and in one beside it."""
        import onnx

        return cls(onnx.load(path))

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self.graph.ByteSize()

    def runner(self, threads: int = 1) -> Forward:
        """The graph as a function, on the processor."""
        return measure.runner(self.graph, threads)

    def admitted(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch as the file can take it: as it is."""
        return dict(batch)

    def rounding_bound(self) -> float:
        """How far two correct float32 evaluations may be apart."""
        return comparison.rounding_bound(self.graph)

    def weight_errors(self, exact: "OnnxFile") -> tuple[WeightError, ...]:
        """How far each weight is from that of the float32 file."""
        return measure.weight_errors(exact.graph, self.graph)

    def write(self, folder: Path) -> None:
        """Writes the file, and a second one where the weights are large."""
        import onnx

        onnx.save_model(
            self.graph,
            folder / self.name,
            save_as_external_data=self.num_bytes > LARGEST_MESSAGE,
            location=f"{self.name}.data",
        )

    def requirements(self) -> dict[str, Any]:
        """What a runtime must be able to do, for the manifest."""
        opsets = {
            o.domain or "ai.onnx": o.version for o in self.graph.opset_import
        }
        return {"min_onnxruntime": self._minimum_runtime(), "opset": opsets}

    def _minimum_runtime(self) -> str:
        graph = self.graph
        opset = max(o.version for o in graph.opset_import if not o.domain)
        newest = importlib.metadata.version("onnxruntime")
        found = [
            RUNTIME_OF_OPSET.get(max(opset, 17), newest),
            RUNTIME_OF_IR.get(max(graph.ir_version, 8), newest),
        ]
        return max(found, key=lambda v: tuple(map(int, v.split(".")[:2])))
