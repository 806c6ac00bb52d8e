"""`report.html`: one page without anything from elsewhere."""

from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence
from html import escape
from typing import Any

from keras_peft.export.report import ExportReport
from keras_peft.export.report import Step
from keras_peft.export.report import WeightError
from keras_peft.export.report import WorstSample
from keras_peft.export.report import megabytes
from keras_peft.export.report_style import STYLE

TITLES = {"keras": "Keras", "float32": "float32", "float16": "float16"}
NUM_LISTED = 8
LONGEST_TEXT = 240


def render(report: ExportReport) -> str:
    """The report as a page that reads on a screen, a phone and paper."""
    sections = [
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


def _head(report: ExportReport) -> str:
    final, first = report.final, report.steps[0]
    saved = first.num_bytes / max(final.num_bytes, 1)
    lead = f"Exported to ONNX as {escape(_title(final))}"
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
        cells.append(("Latency", _ms(final.latency_ms), _ms(first.latency_ms)))
    if final.accuracy is not None and first.accuracy is not None:
        cells.append(
            ("Accuracy", f"{final.accuracy:.1%}", f"{first.accuracy:.1%}")
        )
    shown = [(name, value, f"{was} in Keras") for name, value, was in cells]
    cosine = f"cosine {final.cosine:.5f}"
    shown.append(("Largest difference", _share(final.relative), cosine))
    items = "".join(
        f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>"
        for name, value, note in shown
    )
    return f"<dl class='figures'>{items}</dl>"


def _steps(report: ExportReport) -> str:
    steps = report.steps
    parts = [_bars("Size", steps, [s.num_bytes for s in steps], megabytes)]
    times = [step.latency_ms for step in steps if step.latency_ms is not None]
    if len(times) == len(steps):
        parts.append(_bars("Latency", steps, times, _ms))
    return f"""
<h2>Step by step</h2>
<p class="soft">{escape(report.latency)}</p>
<div class="bars">{"".join(parts)}</div>
{_table(_STEP_HEAD, [_step_row(step) for step in steps], wide=0)}
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
)


def _step_row(step: Step) -> list[str]:
    keras = step.name == "keras"
    return [
        f"<b>{escape(_title(step))}</b>",
        "reference" if keras else f"{step.max_abs:.2g}",
        "" if keras else _share(step.relative),
        "" if keras else f"{step.cosine:.6f}",
        "" if step.accuracy is None else f"{step.accuracy:.2%}",
        "" if keras or step.agreement is None else f"{step.agreement:.2%}",
    ]


def _bars(
    title: str,
    steps: Sequence[Step],
    values: Sequence[float],
    show: Callable[[Any], str],
) -> str:
    largest = max(values) or 1
    rows = []
    for step, value in zip(steps, values, strict=True):
        kind = "keras" if step.name == "keras" else ""
        kind += " final" if step is steps[-1] else ""
        width = f"width:{100 * value / largest:.1f}%"
        rows.append(
            f"<div class='bar {kind}'><span>{escape(_title(step))}</span>"
            f"<span class='track'><i style='{width}'></i></span>"
            f"<span>{show(value)}</span></div>"
        )
    return f"<h3>{title}</h3>{''.join(rows)}"


def _worst(report: ExportReport) -> str:
    if not report.worst_samples:
        return ""
    head = ("Sample", "Label", "Keras", "Exported", "Difference")
    rows = [_sample_row(sample) for sample in report.worst_samples]
    return f"""
<h2>Samples furthest from Keras</h2>
<p>Of {report.num_samples} labeled samples, those whose class changed come
first, then those whose outputs moved most.</p>
{_table(head, rows, wide=0)}"""


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
{_chart(weights)}
{_table(head, rows, wide=0)}"""


def _chart(weights: Sequence[WeightError]) -> str:
    """Columns without text inside, so that they may stretch to any width."""
    top = max(weight.relative for weight in weights) or 1.0
    width = 1000 / len(weights)
    gap = min(0.18 * width, 3)
    columns = "".join(
        f"<rect x='{i * width + gap / 2:.2f}' width='{width - gap:.2f}' "
        f"y='{100 - 100 * weight.relative / top:.2f}' "
        f"height='{100 * weight.relative / top:.2f}'>"
        f"<title>{escape(weight.name)}: {weight.relative:.3%}</title></rect>"
        for i, weight in enumerate(weights)
    )
    lines = "".join(
        f"<line x1='0' x2='1000' y1='{y}' y2='{y}'/>" for y in (0, 50)
    )
    return f"""
<div class="chart">
<div class="y"><span>{top:.2%}</span><span>{top / 2:.2%}</span><span>0</span>
</div>
<svg viewBox="0 0 1000 100" preserveAspectRatio="none" role="img"
aria-label="Error of every weight, worst first">{lines}{columns}</svg>
<div class="x"><span>worst</span><span>best</span></div>
</div>"""


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
{_table(("Reason", "Weights", "Size"), rows, wide=0)}"""


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
{_table(("Layer", "Share lost"), rows, wide=0)}"""


def _notes(report: ExportReport) -> str:
    notes = (
        [f"The graph was traced by {report.tracer}."] if report.tracer else []
    )
    items = "".join(
        f"<li>{escape(note)}</li>" for note in (*notes, *report.notes)
    )
    return f"<h2>Notes</h2><ul>{items}</ul>" if items else ""


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], wide: int = -1
) -> str:
    """A table that becomes a list of cards on a phone.

    Args:
        head: Names of the columns.
        rows: Cells as HTML. Columns that are empty throughout are left out.
        wide: The column that gets a line of its own on a phone.
    """
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]

    def cell(index: int, content: str) -> str:
        kind = "wide" if index == wide else "num" if index else ""
        return (
            f"<td class='{kind}' data-name='{head[index]}'>{content}</td>"
            if content
            else "<td></td>"
        )

    names = "".join(
        f"<th class='{'num' if i else ''}'>{head[i]}</th>" for i in kept
    )
    body = "".join(
        f"<tr>{''.join(cell(i, row[i]) for i in kept)}</tr>" for row in rows
    )
    return (
        f"<div class='scroll'><table class='stack'><thead><tr>{names}</tr>"
        f"</thead><tbody>{body}</tbody></table></div>"
    )


def _title(step: Step) -> str:
    return TITLES.get(step.name, step.name)


def _share(value: float) -> str:
    return f"{value:.1%}" if value >= 1e-3 else f"{value:.1e}"


def _ms(value: float) -> str:
    return f"{value:.1f} ms" if value >= 10 else f"{value:.2f} ms"
