"""Every method on real weights and real data, beside Hugging Face PEFT.

python benchmarks/methods.py sentiment [--methods LoRA,IA3] [--workers 4]
python benchmarks/methods.py dialogue --preset FOLDER
python benchmarks/methods.py table

`sentiment` fine-tunes all-MiniLM-L6-v2 on the sentences of `examples/data/`
and reports accuracy on its test split; `dialogue` fine-tunes SmolLM2-135M on
the dialogues there and reports the held-out loss of a response's tokens. Every
method has its paper's settings, the same learning rates, optimizer, schedule
and number of steps, in this library and, where it has the method, in PEFT.
Each run is a line of `--results`; runs that are there already are left out.
The time of a step of each method is measured while no other one runs. `table`
prints the best rate of each method over its seeds, as Markdown. All of it
takes an hour of a GPU, and days without one.
"""

import argparse
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from runs.alone import device
from runs.data import installed_preset

RATES = {
    "sentiment": (5e-4, 2e-3, 1e-2, 5e-2),
    "dialogue": (2e-5, 1e-4, 5e-4, 2e-3, 1e-2),
}
# Full fine-tuning wants smaller ones.
FULL_RATES = (5e-6, 2e-5, 5e-5, 1e-4)
SEEDS = 3
LIBRARIES = ("keras_peft", "peft")
SETTINGS = dict(rank=8)

# `{name: (class in keras_peft, arguments)}`; `None` adds no adapter.
METHODS = {
    "Untrained": (None, {}),
    "Full": (None, {}),
    "LoRA": ("LoRA", SETTINGS),
    "rsLoRA": ("LoRA", {**SETTINGS, "scaling": "rank_stabilized"}),
    "DoRA": ("LoRA", {**SETTINGS, "decompose": True}),
    "PiSSA": ("LoRA", {**SETTINGS, "init": "pissa"}),
    "OLoRA": ("LoRA", {**SETTINGS, "init": "olora"}),
    "EVA": ("LoRA", {**SETTINGS, "init": "eva"}),
    "LoRA+": ("LoRA", SETTINGS),
    "LoRA-FA": ("LoRA", SETTINGS),
    "AdaLoRA": ("AdaLoRA", {}),
    "LoHa": ("LoHa", SETTINGS),
    "LoKr": ("LoKr", SETTINGS),
    "VeRA": ("VeRA", {}),
    "MiSS": ("MiSS", {}),
    "SHiRA": ("SHiRA", {}),
    "OFT": ("OFT", {}),
    "BOFT": ("BOFT", {}),
    "HRA": ("HRA", SETTINGS),
    "RoAd": ("RoAd", {}),
    "IA3": ("IA3", {}),
    "BitFit": ("BiasTuning", {}),
    "NormTuning": ("NormTuning", {}),
    "Pfeiffer": ("BottleneckAdapter", {}),
    "Houlsby": ("BottleneckAdapter", {"placement": "double"}),
    "Parallel": ("BottleneckAdapter", {"placement": "parallel"}),
    "Compacter": ("Compacter", {}),
    "LoReFT": ("ReFT", {}),
    "PromptTuning": ("PromptTuning", {"num_tokens": 20}),
    "PTuning": ("PTuning", {"num_tokens": 20}),
    "PrefixTuning": ("PrefixTuning", {"num_tokens": 20}),
}
# What the width of SmolLM2-135M asks for; it has no bias to train.
DIALOGUE_METHODS = METHODS | {"Compacter": ("Compacter", {"reduction": 36})}
del DIALOGUE_METHODS["BitFit"]


def methods(task):
    return DIALOGUE_METHODS if task == "dialogue" else METHODS


def jobs(options):
    names = list(methods(options.task))
    if options.methods:
        names = options.methods.split(",")
    libraries = options.libraries.split(",")
    return list(itertools.product(libraries, names))


def key(row):
    fields = ("task", "library", "method", "rate", "seed", "timing")
    return tuple(row[field] for field in fields)


def read(path):
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(path, row):
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def work(options, library, name):
    """All runs of one method: every rate, then the best with more seeds."""
    if library == "peft":
        from runs.peft_runs import Runner
    else:
        from runs.keras_peft_runs import Runner
    rows = {key(row): row for row in read(options.results)}
    method = methods(options.task)[name]
    runner = Runner(options.task, options.preset, name, *method)
    if not runner.available:
        return

    def result(rate, seed, timing=False):
        row = dict(
            task=options.task,
            library=library,
            method=name,
            rate=rate,
            seed=seed,
            timing=timing,
        )
        if key(row) not in rows:
            alone = functools.partial(device, options.results, alone=True)
            if timing:
                found = runner.time(rate, alone)
            else:
                with device(options.results):
                    found = runner.run(rate, seed)
            rows[key(row)] = {**row, **found}
            write(options.results, rows[key(row)])
        return rows[key(row)]

    rates = options.rates or RATES[options.task]
    if name in ("Full", "Untrained"):
        rates = FULL_RATES if name == "Full" else (0.0,)
    found = [result(rate, 0) for rate in rates]
    best = max(found, key=lambda row: row["score"])
    for seed in range(1, options.seeds):
        result(best["rate"], seed)
    if name != "Untrained":
        result(RATES[options.task][0], 0, timing=True)


def spread(options):
    """Runs every job in a process of its own, several at a time."""
    waiting, running, failed = jobs(options), [], []

    def stop(*_):
        for process, *_ in running:
            process.kill()
        os._exit(1)

    signal.signal(signal.SIGTERM, stop)
    while waiting or running:
        while waiting and len(running) < options.workers:
            library, name = waiting.pop(0)
            log = options.results.with_suffix(f".{library}-{name}.log")
            process = subprocess.Popen(
                [
                    *(sys.executable, __file__, *sys.argv[1:]),
                    *("--job", library, name),
                ],
                stdout=subprocess.DEVNULL,
                stderr=log.open("w"),
                env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            )
            running.append((process, library, name, log))
        time.sleep(0.2)
        for entry in [e for e in running if e[0].poll() is not None]:
            running.remove(entry)
            process, library, name, log = entry
            if process.returncode:
                failed.append(f"{library} {name}")
                print(f"{library} {name} failed:", log.read_text()[-1500:])
            else:
                log.unlink()
    print(f"{len(read(options.results))} runs in {options.results}.")
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}.")


# -- Table -------------------------------------------------------------------


def table(rows):
    for task, unit in (("sentiment", "accuracy, %"), ("dialogue", "loss")):
        found = [r for r in rows if r["task"] == task and not r["timing"]]
        timed = {
            (r["library"], r["method"]): r["step_ms"]
            for r in rows
            if r["task"] == task and r["timing"]
        }
        if not found:
            continue
        print(
            f"\n| {task} | {unit} | PEFT's | rate | parameters | adapter, kB "
            "| step, ms | PEFT's | merges |\n" + "|---" * 9 + "|"
        )
        for name in METHODS:
            ours = best([r for r in found if is_of(r, "keras_peft", name)])
            theirs = best([r for r in found if is_of(r, "peft", name)])
            if ours is None:
                continue
            steps = [timed.get((library, name)) for library in LIBRARIES]
            print(
                f"| {name} | {figure(task, ours)} | {figure(task, theirs)} "
                f"| {ours[0]['rate']:g} | {ours[0]['parameters']:,} "
                f"| {ours[0]['bytes'] / 1000:,.0f} "
                f"| {milliseconds(steps[0])} | {milliseconds(steps[1])} "
                f"| {'yes' if ours[0]['merges'] else 'no'} |"
            )


def is_of(row, library, name):
    return row["library"] == library and row["method"] == name


def best(rows):
    """The runs of the rate that was best with the first seed."""
    first = [row for row in rows if row["seed"] == 0]
    if not first:
        return None
    rate = max(first, key=lambda row: row["score"])["rate"]
    return [row for row in rows if row["rate"] == rate]


def figure(task, rows):
    if rows is None:
        return ""
    scores = np.array([row["score"] for row in rows])
    scores, digits = (100 * scores, 1) if task == "sentiment" else (-scores, 3)
    spread = f" ± {scores.std():.{digits}f}" if len(scores) > 1 else ""
    return f"{scores.mean():.{digits}f}{spread}"


def milliseconds(step):
    return "" if step is None else f"{step:.1f}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=("sentiment", "dialogue", "table"))
    parser.add_argument("--preset", default=None)
    parser.add_argument("--methods")
    parser.add_argument("--libraries", default=",".join(LIBRARIES))
    parser.add_argument(
        "--rates",
        type=lambda text: [float(rate) for rate in text.split(",")],
        help="instead of those of the task",
    )
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("methods.jsonl"))
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task == "dialogue" and options.preset is None:
        parser.error("--preset is needed: a folder of SmolLM2-135M")
    options.preset = options.preset or installed_preset()
    if options.task == "table":
        table(read(options.results))
    elif options.job:
        work(options, *options.job)
    else:
        spread(options)


if __name__ == "__main__":
    main()
