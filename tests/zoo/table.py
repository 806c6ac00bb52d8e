"""Writes `docs/coverage.md` and `docs/targets.md`.

python tests/zoo/table.py [--results FILE]

The first from the results of `run.py`, the second from the models themselves.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import re
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from zoo import ZOO  # noqa: E402
from zoo.columns import COLUMNS  # noqa: E402
from zoo.columns import has_column  # noqa: E402
from zoo.run import BACKENDS  # noqa: E402
from zoo.run import RESULTS  # noqa: E402

TITLES = {
    "targets": "layers by group",
    "train": "LoRA trains",
    "generate": "generate",
    "save": "save, load",
    "merge": "merge",
    "onnx": "ONNX",
    "onnx int8": "ONNX int8",
    "litert": "LiteRT",
}
PACKAGES = {
    "keras": "Keras",
    "keras-hub": "keras-hub",
    "tensorflow": "TensorFlow",
    "jax": "JAX",
    "torch": "torch",
    "onnxruntime": "ONNX Runtime",
}
COVERAGE = """# Coverage

Every backbone and every task of keras-hub, from `adapt` to a file for a
device. `make coverage` holds a tiny model of each class to what its
architecture says, and writes this page ({date}; {versions}).

- **layers by group**: each target group finds the layers of the architecture.
- **LoRA trains**: `fit` moves every variable of the adapter and no bit of the
  base.
- **generate**: greedy tokens with a cache, adapter in place, are those of the
  whole model.
- **save, load**: an adapter file brings a fresh model to the same outputs, bit
  for bit.
- **merge**: merged outputs equal the adapted ones; `unmerge` brings every bit
  back.
- **ONNX**, **LiteRT**: the merged model's file computes in its runtime what
  Keras computes, on other batch sizes, lengths and image sizes than the traced
  ones. **ONNX int8** runs on them too.

✓ holds on TensorFlow, JAX and torch. A dash is something that keras-hub itself
cannot do; the note says what. ✗ failed, ? was not run. An empty cell has no
meaning for the class. What a group names on a model is in
[targets.md](targets.md).
"""
TARGETS = """# Which layers a target group means

```python
keras_peft.adapt(model, keras_peft.LoRA(), targets="attention")
```

takes the projections of every attention, `"mlp"` the linear layers of
feed-forward parts, `"all-linear"` every linear layer, `"embeddings"` the tables
and `"convolutions"` the convolutions. Heads of tasks belong to no group: they
train in full. Without `targets`, LoRA takes the groups named as its default.

Below is what each group finds on every backbone of keras-hub, as regular
expressions that work as `targets` too. `python tests/zoo/table.py` writes this
page from the code. `keras_peft.summary(model)` lists the layers of your own
model once it is adapted.
"""


def coverage(rows):
    """The page of all results, and how many of them failed."""
    import keras_hub

    found = {(r["name"], r["column"], r["backend"]): r for r in rows}
    versions = [
        f"{title} {importlib.metadata.version(package)}"
        for package, title in PACKAGES.items()
    ]
    text = COVERAGE.format(
        date=datetime.date.today(), versions=", ".join(versions)
    )
    notes: list[str] = []
    columns = [column for column in COLUMNS if column in TITLES]
    head = "|".join(TITLES[column] for column in columns)
    missing = 0
    for title, kind in (
        ("Backbones", keras_hub.models.Backbone),
        ("Tasks", keras_hub.models.Task),
    ):
        text += f"\n## {title}\n\n||{head}|\n{'|---' * (len(columns) + 1)}|\n"
        for name in sorted(ZOO):
            if not issubclass(getattr(keras_hub.models, ZOO[name].kind), kind):
                continue
            cells = [cell(name, c, found, notes) for c in columns]
            missing += sum("✗" in c or "?" in c for c in cells)
            text += f"|`{name}`|{'|'.join(cells)}|\n"
    listed = "".join(f"{n}. {note}\n" for n, note in enumerate(notes, 1))
    return f"{text}\n## Notes\n\n{listed}" if listed else text, missing


def cell(name, column, found, notes):
    """One cell: what holds on all backends, or where it does not and why."""
    if not has_column(ZOO[name], column):
        return ""
    results = {b: found.get((name, column, b)) for b in BACKENDS}
    parts = []
    for backend, result in results.items():
        if result is not None and "unable" in result:
            reason = result["unable"]
            if reason not in notes:
                notes.append(reason)
            parts.append((backend, f"–<sup>{notes.index(reason) + 1}</sup>"))
        elif result is None:
            parts.append((backend, "?"))
        elif "error" in result:
            parts.append((backend, "✗"))
        else:
            counts = column == "targets"
            parts.append((backend, result["found"] if counts else "✓"))
    places: dict[str, list[str]] = {}
    for backend, mark in parts:
        places.setdefault(mark, []).append(PACKAGES[backend])
    if len(places) == 1:
        return parts[0][1]
    return "; ".join(f"{mark} {', '.join(p)}" for mark, p in places.items())


def targets():
    """The page of the layers of every backbone."""
    import keras_hub

    from keras_peft.targets import GROUPS
    from keras_peft.targets import Candidates

    text = TARGETS
    for name in sorted(ZOO):
        kind = getattr(keras_hub.models, ZOO[name].kind)
        if not issubclass(kind, keras_hub.models.Backbone):
            continue
        case = ZOO[name]
        candidates = Candidates(case.build(), ())
        default = ", ".join(f'"{group}"' for group in case.default)
        text += f"\n## {name}\n\nDefault: `{default}`.\n\n"
        listed: set[str] = set()
        for group in GROUPS:
            paths = candidates.group(group)
            new = [path for path in paths if path not in listed]
            listed.update(paths)
            if not paths:
                continue
            also = "" if len(new) == len(paths) else ", beside these"
            patterns = "".join(f"  - `{p}`\n" for p in collapse(new))
            text += f"- `{group}`{also}\n{patterns}" if new else ""
    return text


def collapse(paths):
    """Regular expressions, one for all parts that differ in numbers only."""
    lasts: dict[str, list[str]] = {}
    for path in paths:
        escaped = re.escape(re.sub(r"(?<=[._])\d+(?=\.|$)", "#", path))
        part, dot, last = escaped.replace(r"\#", r"\d+").rpartition(r"\.")
        found = lasts.setdefault(part + dot, [])
        if last not in found:
            found.append(last)
    return [
        part + (found[0] if len(found) == 1 else f"({'|'.join(found)})")
        for part, found in lasts.items()
    ]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    with options.results.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    page, missing = coverage(rows)
    (ROOT / "docs" / "coverage.md").write_text(page, encoding="utf-8")
    (ROOT / "docs" / "targets.md").write_text(targets(), encoding="utf-8")
    print("Wrote docs/coverage.md and docs/targets.md.")
    if missing:
        sys.exit(f"{missing} cells are missing or failed.")


if __name__ == "__main__":
    main()
