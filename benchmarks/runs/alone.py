"""Sharing a device between processes of a benchmark."""

import contextlib
import fcntl


@contextlib.contextmanager
def device(path, alone=False):
    """Waits until no other process has it `alone`, or until none has it.

    `path` names two files beside it, which the processes lock.
    """
    gate = path.with_suffix(".gate")
    with gate.open("w") as turn, path.with_suffix(".lock").open("w") as use:
        # Who waits to be alone keeps the gate, so that others cannot overtake.
        fcntl.flock(turn, fcntl.LOCK_EX)
        fcntl.flock(use, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(turn, fcntl.LOCK_UN)
        yield
