"""How the rows of `benchmarks/train_gpu.py` are timed."""

import time

from runs.alone import device

WARM, TIMED, TURNS = 4, 40, 2


def seconds_per_step(path, train, steps=TIMED):
    """Of each turn of `train(steps)`, while no other process has the device."""
    times = []
    with device(path, alone=True):
        # Also alone: others may be choosing kernels by their times.
        train(WARM)
        for _ in range(TURNS):
            start = time.perf_counter()
            train(steps)
            times.append((time.perf_counter() - start) / steps)
    return times
