"""Holds every class of keras-hub to every column, on every backend.

python tests/zoo/run.py [--backends torch] [--only Bert] [--columns train,onnx]

Each result is a line of `--results`, with the error where there is one, and
results that are there already are left out: `--again` forgets those of this
selection, `--failed` the failed ones.
"""

import argparse
import contextlib
import gc
import json
import os
import re
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "build" / "coverage.jsonl"
BACKENDS = ("tensorflow", "jax", "torch")
# A process keeps what every model compiled; a fresh one takes seconds.
CASES_PER_PROCESS = 12
# Stands before a result: whatever else a library prints is passed over.
MARK = "=> "
LONGEST_ERROR = 600


# -- One case, in a process of its backend -----------------------------------


def hold(case, columns):
    """Yields a result for each of `columns`."""
    import keras

    from zoo.columns import COLUMNS
    from zoo.columns import INSTEAD
    from zoo.columns import NEEDS
    from zoo.columns import Subject
    from zoo.columns import has_column

    backend = keras.config.backend()
    needed = set(columns)
    for column in reversed(COLUMNS):
        if column in needed and column in NEEDS:
            needed.add(NEEDS[column])
    subject, failed = None, {}
    for column in (column for column in COLUMNS if column in needed):
        if not has_column(case, column):
            continue
        row = dict(name=case.name, backend=backend, column=column)
        asked = column in columns
        run = COLUMNS[column]
        if not asked:  # A step on the way: the quick one will do.
            run = INSTEAD.get(column, run)
        unable = case.unable.get(
            column, case.unable.get(f"{column} on {backend}")
        )
        if backend in case.unable:
            row["unable"], run = case.unable[backend], None
        elif unable:
            row["unable"], run = unable, INSTEAD.get(column)
        needs = NEEDS.get(column)
        if run is None:
            failed[column] = row["unable"]
        elif needs in failed:
            row["error"] = failed[column] = f"needs {needs}: {failed[needs]}"
        else:
            start = time.monotonic()
            try:
                subject = subject or Subject(case)
                row["found"] = run(subject) or ""
            except Exception as error:
                failed[column] = f"{type(error).__name__}: {error}"
                row["error"] = failed[column][:LONGEST_ERROR]
                row["trace"] = traceback.format_exc()[-4000:]
            row["seconds"] = round(time.monotonic() - start, 1)
        if asked:
            yield row


def work(columns):
    """Reads names of cases, writes their results."""
    import keras

    from zoo import ZOO

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        for row in hold(ZOO[line.strip()], columns):
            print(MARK + json.dumps(row), file=replies, flush=True)
        print(MARK + "null", file=replies, flush=True)
        keras.backend.clear_session()
        gc.collect()


# -- All cases, over processes -----------------------------------------------


def spread(options):
    """Runs what is wanted and not there yet, several processes at a time."""
    waiting = list(jobs(options))
    print(f"{len(waiting)} models to go.", flush=True)
    lock = threading.Lock()

    def next_job(backend=None):
        with lock:
            for index, job in enumerate(waiting):
                if backend in (None, job[0]):
                    return waiting.pop(index)
        return None

    def serve():
        while job := next_job():
            backend = job[0]
            with worker(backend, options.columns) as process:
                for left in reversed(range(CASES_PER_PROCESS)):
                    alive = ask(process, *job, options)
                    job = next_job(backend) if alive and left else None
                    if job is None:
                        break

    threads = [threading.Thread(target=serve) for _ in range(options.workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def jobs(options):
    """`(backend, name)` of the models that lack a result."""
    done = {(r["backend"], r["name"], r["column"]) for r in read(options)}
    from zoo import ZOO
    from zoo.columns import has_column

    for backend in options.backends:
        for name, case in ZOO.items():
            if re.search(options.only, name) and any(
                (backend, name, column) not in done and has_column(case, column)
                for column in options.columns
            ):
                yield backend, name


@contextlib.contextmanager
def worker(backend, columns):
    environment = os.environ | {
        "KERAS_BACKEND": backend,
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, __file__, "--worker"]
    process = subprocess.Popen(
        [*command, "--columns", ",".join(columns)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def ask(process, backend, name, options):
    """Has a process hold one case; returns whether it lives on."""
    process.stdin.write(name + "\n")
    process.stdin.flush()
    for line in process.stdout:
        if not line.startswith(MARK):
            continue
        row = json.loads(line.removeprefix(MARK))
        if row is None:
            return True
        write(options, row)
    row = dict(name=name, backend=backend, error="the process died")
    for column in options.columns:
        write(options, {**row, "column": column})
    return False


def write(options, row):
    with options.results.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")
    said = row.get("error") or row.get("unable") or row["found"]
    sign = "FAILED " if "error" in row else ""
    said = said.splitlines()[0][:120] if said else ""
    place = f"{row['backend']} {row['name']} {row['column']}"
    print(f"{sign}{place}: {said} ({row.get('seconds', 0)} s)", flush=True)


def read(options):
    if not options.results.exists():
        return []
    with options.results.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def forget(options):
    """Drops results of this selection, or the failed ones among them."""
    kept = [
        row
        for row in read(options)
        if not (
            re.search(options.only, row["name"])
            and row["backend"] in options.backends
            and row["column"] in options.columns
            and (options.again or "error" in row)
        )
    ]
    text = "".join(json.dumps(row) + "\n" for row in kept)
    options.results.write_text(text, encoding="utf-8")


def main():
    sys.path.insert(0, str(ROOT / "tests"))
    from zoo.columns import COLUMNS

    parser = argparse.ArgumentParser()
    split = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--backends", type=split, default=list(BACKENDS))
    parser.add_argument("--only", default="", help="a regular expression")
    parser.add_argument("--columns", type=split, default=list(COLUMNS))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--failed", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    if options.worker:
        work(options.columns)
        return
    if options.again or options.failed:
        forget(options)
    spread(options)


if __name__ == "__main__":
    main()
