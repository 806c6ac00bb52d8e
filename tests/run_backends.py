"""Runs the tests once for each backend.

python tests/run_backends.py [--slow] [arguments for pytest]

With `--slow` all of them, and then prints what they cover together: to watch
every line takes about as long as the tests do.
"""

import os
import subprocess
import sys
import time

FAST = {
    "tensorflow": "(slice or not moved) and not slow",
    "jax": "slice and not slow",
    "torch": "(slice or moved) and not slow",
}
SLOW = dict.fromkeys(FAST, "")
PYTEST = (
    *(sys.executable, "-m", "pytest", "--durations=5"),
    *("--numprocesses=2", "--dist=worksteal"),
)
WATCHED = ("--cov=keras_peft", "--cov=export", "--cov-report=")


def main(arguments):
    slow = arguments[:1] == ["--slow"]
    arguments = [*(WATCHED if slow else ()), *arguments[slow:]]
    if slow:
        coverage("erase")
    failed = [
        backend
        for backend, marks in (SLOW if slow else FAST).items()
        if run_tests(backend, marks, arguments)
    ]
    if slow and (coverage("combine", "--quiet") or coverage("report")):
        failed.append("coverage")
    sys.exit(f"Failed: {', '.join(failed)}." if failed else 0)


def run_tests(backend, marks, arguments):
    """Pytest's exit status: selecting no test at all is a failure too."""
    print(f"Testing on {backend}: {marks or 'everything'}.", flush=True)
    start = time.monotonic()
    status = subprocess.call(
        [*PYTEST, "-m", marks, *arguments],
        env={
            **os.environ,
            "KERAS_BACKEND": backend,
            # Each run erases the file it writes to.
            "COVERAGE_FILE": f".coverage.{backend}",
        },
    )
    minutes = (time.monotonic() - start) / 60
    print(f"{backend}: {minutes:.1f} minutes, exit status {status}.")
    return status


def coverage(*command):
    sys.stdout.flush()
    return subprocess.call([sys.executable, "-m", "coverage", *command])


if __name__ == "__main__":
    main(sys.argv[1:])
