"""Options and results of the benchmarks of training on GPUs."""

import argparse
import json
from pathlib import Path


def options_of(rows, results):
    """The command line of a script whose `rows` are jobs of their own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command", nargs="?", choices=("run", "table"))
    parser.add_argument("--rows", nargs="+", default=rows, choices=rows)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--results", type=Path, default=Path(results))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.results.parent.mkdir(exist_ok=True)
    return options


def write_row(options, shape, found, **said):
    speed = shape["rows"] * shape["length"] / found["step"]
    row = dict(row=options.job, **said, tokens_per_s=speed, **found)
    with options.results.open("a") as lines:
        lines.write(json.dumps(row) + "\n")
