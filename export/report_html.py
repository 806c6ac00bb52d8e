"""`report.html`: one page without anything from elsewhere."""

from collections import defaultdict
from collections.abc import Sequence
from html import escape

from keras_peft.export.report import ExportReport
from keras_peft.export.report import Step
from keras_peft.export.report import WeightError
from keras_peft.export.report import WorstSample
from keras_peft.export.report import megabytes
from keras_peft.export.report_parts import bars
from keras_peft.export.report_parts import chart
from keras_peft.export.report_parts import milliseconds
from keras_peft.export.report_parts import share
from keras_peft.export.report_parts import table
from keras_peft.export.report_parts import title
from keras_peft.export.report_style import STYLE

NUM_LISTED = 8
LONGEST_TEXT = 240


def render(report: ExportReport) -> str:
    """The report as a page that reads on a screen, a phone and paper."""
    sections = [
        _warning(report),
        _head(report),
        _figures(report),
        _steps(report),
        _worst(report),
        _weights(report.weights),
        _left_float(report),
        _merge(report),
        _notes(report),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(report.model)}: export report</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{"".join(sections)}
<footer>Made by keras_peft. The same figures, and all of them, are in
<code>report.json</code>.</footer>
</main>
</body>
</html>
"""


def _warning(report: ExportReport) -> str:
    text = escape(report.warning)
    return f"<p><strong>{text}</strong></p>" if text else ""


def _head(report: ExportReport) -> str:
    final, first = report.final, report.steps[0]
    saved = first.num_bytes / max(final.num_bytes, 1)
    lead = f"Exported to {report.format} as {escape(title(final))}"
    if saved >= 1.2:
        lead += f", {saved:.1f} times smaller than in Keras"
    if final.agreement is not None:
        lead += (
            f". It gives the class that Keras gives for {final.agreement:.1%} "
            f"of {report.num_samples} samples"
        )
    return f"<h1>{escape(report.model)}</h1><p class='lead'>{lead}.</p>"


def _figures(report: ExportReport) -> str:
    final, first = report.final, report.steps[0]
    cells = [("Size", megabytes(final.num_bytes), megabytes(first.num_bytes))]
    if final.latency_ms is not None and first.latency_ms is not None:
        cells.append(
            (
                "Latency",
                milliseconds(final.latency_ms),
                milliseconds(first.latency_ms),
            )
        )
    if final.accuracy is not None and first.accuracy is not None:
        cells.append(
            ("Accuracy", f"{final.accuracy:.1%}", f"{first.accuracy:.1%}")
        )
    shown = [(name, value, f"{was} in Keras") for name, value, was in cells]
    cosine = f"cosine {final.cosine:.5f}"
    shown.append(("Largest difference", share(final.relative), cosine))
    items = "".join(
        f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>"
        for name, value, note in shown
    )
    return f"<dl class='figures'>{items}</dl>"


def _steps(report: ExportReport) -> str:
    steps = report.steps
    parts = [bars("Size", steps, [s.num_bytes for s in steps], megabytes)]
    times = [step.latency_ms for step in steps if step.latency_ms is not None]
    if len(times) == len(steps):
        parts.append(bars("Latency", steps, times, milliseconds))
    return f"""
<h2>Step by step</h2>
<p class="soft">{escape(report.latency)}</p>
<div class="bars">{"".join(parts)}</div>
{table(_STEP_HEAD, [_step_row(step) for step in steps], wide=0)}
<p class="soft" style="margin-top:12px">The difference is the largest from an
output of Keras, on other sizes than the graph was traced with; relative means
over the largest output.</p>"""


_STEP_HEAD = (
    "Step",
    "Difference",
    "Relative",
    "Cosine",
    "Accuracy",
    "Same class",
    "Loss",
)


def _step_row(step: Step) -> list[str]:
    keras = step.name == "keras"
    return [
        f"<b>{escape(title(step))}</b>",
        "reference" if keras else f"{step.max_abs:.2g}",
        "" if keras else share(step.relative),
        "" if keras else f"{step.cosine:.6f}",
        "" if step.accuracy is None else f"{step.accuracy:.2%}",
        "" if keras or step.agreement is None else f"{step.agreement:.2%}",
        "" if step.loss is None else f"{step.loss:.4f}",
    ]


def _worst(report: ExportReport) -> str:
    if not report.worst_samples:
        return ""
    head = ("Sample", "Label", "Keras", "Exported", "Difference")
    rows = [_sample_row(sample) for sample in report.worst_samples]
    return f"""
<h2>Samples furthest from Keras</h2>
<p>Of {report.num_samples} labeled samples, those whose class changed come
first, then those whose outputs moved most.</p>
{table(head, rows, wide=0)}"""


def _sample_row(sample: WorstSample) -> list[str]:
    name = f"no. {sample.index}"
    if sample.text is not None:
        name = sample.text[:LONGEST_TEXT]
        name += "…" if len(sample.text) > LONGEST_TEXT else ""
    changed = sample.exported != sample.keras
    exported = escape(sample.exported)
    return [
        escape(name),
        escape(sample.label),
        escape(sample.keras),
        f"<span class='changed'>{exported}</span>" if changed else exported,
        f"{sample.difference:.2g}",
    ]


def _weights(weights: Sequence[WeightError]) -> str:
    if not weights:
        return ""
    head = ("Weight", "Shape", "Stored as", "Error")
    rows = [
        [
            f"<code>{escape(weight.name)}</code>",
            " × ".join(map(str, weight.shape)),
            weight.stored,
            f"{weight.relative:.2%}",
        ]
        for weight in weights[:NUM_LISTED]
    ]
    return f"""
<h2>Error per weight</h2>
<p>What storing a weight in fewer bits changed, relative to its norm; all
{len(weights)} weights, worst first.</p>
{chart(weights)}
{table(head, rows, wide=0)}"""


def _left_float(report: ExportReport) -> str:
    if not report.weights_left_float:
        return ""
    groups = defaultdict(list)
    for weight in report.weights_left_float:
        groups[weight.reason].append(weight)
    rows = [
        [
            escape(reason),
            str(len(weights)),
            megabytes(sum(weight.num_bytes for weight in weights)),
        ]
        for reason, weights in groups.items()
    ]
    return f"""
<h2>Weights left in floating point</h2>
{table(("Reason", "Weights", "Size"), rows, wide=0)}"""


def _merge(report: ExportReport) -> str:
    errors = report.merge_errors
    if not errors:
        return ""
    worst = sorted(errors.items(), key=lambda item: -item[1])[:NUM_LISTED]
    rows = [
        [f"<code>{escape(path)}</code>", f"{error:.2g}"]
        for path, error in worst
    ]
    return f"""
<h2>Merging the adapters</h2>
<p>What rounding the merged kernels lost of the change that was trained, in
{len(errors)} layers; the largest first.</p>
{table(("Layer", "Share lost"), rows, wide=0)}"""


def _notes(report: ExportReport) -> str:
    notes = (
        [f"The graph was traced by {report.tracer}."] if report.tracer else []
    )
    items = "".join(
        f"<li>{escape(note)}</li>" for note in (*notes, *report.notes)
    )
    return f"<h2>Notes</h2><ul>{items}</ul>" if items else ""
