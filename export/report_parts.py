"""The parts of `report.html`: bars, a chart, tables, numbers."""

from collections.abc import Callable
from collections.abc import Sequence
from html import escape
from typing import Any

from keras_peft.export.report import Step
from keras_peft.export.report import WeightError

TITLES = {"keras": "Keras", "float32": "float32", "float16": "float16"}


def bars(
    heading: str,
    steps: Sequence[Step],
    values: Sequence[float],
    show: Callable[[Any], str],
) -> str:
    """One bar per step, the first in gray and the last in full color."""
    largest = max(values) or 1
    rows = []
    for step, value in zip(steps, values, strict=True):
        kind = "keras" if step.name == "keras" else ""
        kind += " final" if step is steps[-1] else ""
        width = f"width:{100 * value / largest:.1f}%"
        rows.append(
            f"<div class='bar {kind}'><span>{escape(title(step))}</span>"
            f"<span class='track'><i style='{width}'></i></span>"
            f"<span>{show(value)}</span></div>"
        )
    return f"<h3>{heading}</h3>{''.join(rows)}"


def chart(weights: Sequence[WeightError]) -> str:
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


def table(
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


def title(step: Step) -> str:
    """What a step is called on the page."""
    return TITLES.get(step.name, step.name)


def milliseconds(value: float) -> str:
    """A time with three figures or so."""
    return f"{value:.1f} ms" if value >= 10 else f"{value:.2f} ms"


def share(value: float) -> str:
    """A share in percent, or as a power of ten where it is tiny."""
    return f"{value:.1%}" if value >= 1e-3 else f"{value:.1e}"
