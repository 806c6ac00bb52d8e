"""How the rows of `benchmarks/train_gpu.py` are timed."""

import time

from runs.alone import device

WARM, TIMED, TURNS = 4, 60, 2


def seconds_per_step(path, train):
    """Of each turn of `train(steps)`, while no other process has the device."""
    times = []
    with device(path, alone=True):
        for _ in range(TURNS):
            start = time.perf_counter()
            train(TIMED)
            times.append((time.perf_counter() - start) / TIMED)
    return times
