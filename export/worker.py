"""Processes that trace, each with a Keras backend of its own, kept warm.

Most of an export's time was importing Keras and its tracer. A process stays
for a while after a trace and takes the next one at once.
"""

import atexit
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO

# How long a process waits for the next trace, holding its memory.
IDLE_SECONDS = 120.0

_LONGEST_MESSAGE = 800


class TracingError(RuntimeError):
    """A tracer could not turn the model into a graph."""


def run(folder: Path, backend: str, keep: bool) -> None:
    """Has the request in `folder` served by a process of a backend.

    Args:
        folder: Holds the request, and is where its result appears.
        backend: `"torch"` or `"tensorflow"`.
        keep: Whether the process may be one that served before, and stays for
            others. Modules of the user's may have changed since, so a request
            with such gets one of its own.

    Raises:
        TracingError: With the essential part of the process's own message.
    """
    with _LOCK:
        worker = _WORKERS.pop(backend, None) if keep else None
        if worker is not None and not worker.alive:
            worker.close()
            worker = None
        worker = worker or _Worker(backend)
        try:
            error = worker.serve(folder)
        except BaseException:
            worker.close()
            raise
        if keep and worker.alive:
            _WORKERS[backend] = worker
            worker.close_after(IDLE_SECONDS)
        else:
            worker.close()
    if error:
        raise TracingError(error)


class _Worker:
    """One process, which serves one request after the other."""

    def __init__(self, backend: str) -> None:
        self.messages: IO[bytes] = tempfile.TemporaryFile()
        environment = os.environ | {
            "KERAS_BACKEND": backend,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "CUDA_VISIBLE_DEVICES": "",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "keras_peft.export.trace_child"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.messages,
            text=True,
        )
        self.timer: threading.Timer | None = None

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def serve(self, folder: Path) -> str | None:
        """Returns what went wrong, or `None`."""
        if self.timer is not None:
            self.timer.cancel()
        start = self.messages.seek(0, os.SEEK_END)
        try:
            print(folder, file=self.process.stdin, flush=True)
            reply = self.process.stdout.readline()  # type: ignore[union-attr]
        except OSError:  # It ended in the meantime.
            reply = ""
        failure = folder / "error.txt"
        if reply and not failure.exists():
            return None
        if failure.exists():
            text = failure.read_text(encoding="utf-8", errors="replace")
        else:
            self.process.wait()
            self.messages.seek(start)
            text = self.messages.read().decode(errors="replace")
        return _essence(text) or (
            f"the process ended with exit code {self.process.returncode}"
        )

    def close_after(self, seconds: float) -> None:
        self.timer = threading.Timer(seconds, self.process.kill)
        self.timer.daemon = True
        self.timer.start()

    def close(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.process.kill()
        self.process.communicate()
        self.messages.close()


_LOCK = threading.Lock()
_WORKERS: dict[str, _Worker] = {}


@atexit.register
def _close_all() -> None:
    while _WORKERS:
        _WORKERS.popitem()[1].close()


def _essence(text: str) -> str:
    """The last exception of a traceback, its frames and colors left out."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    # torch's exporter puts its advice first and the cause in a summary.
    summary = text.rpartition("## Exception summary")[2]
    if summary != text:
        return re.sub(r"\n\n+", "\n", summary.strip())[:_LONGEST_MESSAGE]
    lines = [line for line in text.splitlines() if line.strip()]
    frames = [n for n, line in enumerate(lines) if line.startswith("  File ")]
    start = frames[-1] + 1 if frames else max(len(lines) - 10, 0)
    tail = [line for line in lines[start:] if not line.startswith("    ")]
    return "\n".join(tail).strip()[:_LONGEST_MESSAGE]
