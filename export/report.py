"""What an export measured: as an object, as `report.json`, as a table."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keras_peft.export.result import FloatWeight


@dataclasses.dataclass(frozen=True)
class Step:
    """One form of the model on its way from Keras to the device.

    Attributes:
        name: `"keras"` for the model as it was given, then `"float32"`, and
            `"float16"` or `"int8"`.
        num_bytes: Size of the weights in Keras, of the file afterwards.
        latency_ms: Median time of one call on one sample.
        max_abs: Largest difference from Keras over all outputs and samples.
        relative: The same over the largest magnitude of the output.
        cosine: Smallest cosine between an output and the one of Keras.
        accuracy: Share of labeled samples that are classified correctly.
        agreement: Share of the same samples that get the class Keras gives.
        loss: Mean negative log-likelihood of a token of text.
    """

    name: str
    num_bytes: int
    latency_ms: float | None = None
    max_abs: float = 0.0
    relative: float = 0.0
    cosine: float = 1.0
    accuracy: float | None = None
    agreement: float | None = None
    loss: float | None = None


@dataclasses.dataclass(frozen=True)
class WeightError:
    """What storing a weight in fewer bits changed.

    Attributes:
        name: Name of the weight in the float32 graph.
        shape: Its shape.
        relative: Norm of the change over the norm of the weight.
        stored: Type it is stored in, such as `"int8"`.
    """

    name: str
    shape: tuple[int, ...]
    relative: float
    stored: str


@dataclasses.dataclass(frozen=True)
class WorstSample:
    """A labeled sample on which the exported model is furthest from Keras.

    Attributes:
        index: Position among the samples.
        text: The sample, where samples are texts.
        difference: Largest difference of an output.
        label: The class it has.
        keras: The class Keras gives.
        exported: The class the exported model gives.
    """

    index: int
    text: str | None
    difference: float
    label: str
    keras: str
    exported: str


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """Size, latency and quality before and after each step of an export.

    `print(report)` shows the steps as a table. `report.json` in the folder
    holds all of it, and `report.html` shows it.

    Attributes:
        model: Name of the Keras model.
        steps: The forms of the model, Keras first, the file last.
        latency: How latency was measured, in words.
        num_samples: Number of labeled samples, or 0.
        worst_samples: Samples furthest from Keras, worst first.
        weights: Weights that the file stores in fewer bits, worst first.
        weights_left_float: Weights that it does not, and why.
        merge_errors: Rounding error of every merged layer by its path.
        tracer: What made the graph.
        notes: Sentences a user should read.
        format: The format of the file: `"ONNX"` or `"LiteRT"`.
        warning: What speaks against shipping the file, if anything does.
    """

    model: str
    steps: tuple[Step, ...]
    latency: str = ""
    num_samples: int = 0
    worst_samples: tuple[WorstSample, ...] = ()
    weights: tuple[WeightError, ...] = ()
    weights_left_float: tuple[FloatWeight, ...] = ()
    merge_errors: Mapping[str, float] | None = None
    tracer: str = ""
    notes: tuple[str, ...] = ()
    format: str = "ONNX"
    warning: str = ""

    @property
    def final(self) -> Step:
        """The step that is in the folder."""
        return self.steps[-1]

    def to_dict(self) -> dict[str, Any]:
        """The report as it is written to `report.json`."""
        return dataclasses.asdict(self)

    def write(self, folder: Path) -> None:
        """Writes `report.json` and `report.html`."""
        from keras_peft.export.report_html import render

        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
        (folder / "report.json").write_text(text + "\n", "utf-8")
        (folder / "report.html").write_text(render(self), "utf-8")

    def __str__(self) -> str:
        head = ("step", "size", "latency", "difference", "accuracy", "loss")
        rows = [head, *map(_row, self.steps)]
        columns = [c for c in zip(*rows, strict=True) if any(c[1:])]
        widths = [max(map(len, column)) for column in columns]
        lines = [
            "  ".join(
                cell.ljust(width)
                for cell, width in zip(row, widths, strict=True)
            )
            for row in zip(*columns, strict=True)
        ]
        return "\n".join([self.warning, *lines] if self.warning else lines)


def _row(step: Step) -> tuple[str, ...]:
    return (
        step.name,
        megabytes(step.num_bytes),
        "" if step.latency_ms is None else f"{step.latency_ms:.2f} ms",
        "" if step.name == "keras" else f"{step.relative:.1e}",
        "" if step.accuracy is None else f"{step.accuracy:.1%}",
        "" if step.loss is None else f"{step.loss:.4f}",
    )


def megabytes(num_bytes: int) -> str:
    """A size as people read it: `22.7 MB`, `48 kB`."""
    if num_bytes >= 1e6:
        return f"{num_bytes / 1e6:.1f} MB"
    return f"{num_bytes / 1e3:.0f} kB"
