"""Which kernels a GPU spends its time on, in a program of JAX."""

import collections
import tempfile
from pathlib import Path

# Of names of kernels, the first part that fits.
KINDS = {
    "cudnn": "attention",
    "nvjet": "products",
    "gemm": "products",
    "cutlass": "products",
    "splitK": "products",
    "reduce": "reductions",
}


def milliseconds_by_kind(run, steps):
    """`{kind: milliseconds of kernels in a step}` while `run(steps)` runs."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run(steps)
        [path] = Path(folder).rglob("*.xplane.pb")
        events = list(kernels(jax.profiler.ProfileData.from_file(str(path))))
    sums = collections.Counter()
    for event in events:
        sums[kind_of(event.name)] += event.duration_ns / 1e6 / steps
    return dict(sums.most_common())


def kernels(profile):
    for plane in profile.planes:
        if "GPU" in plane.name:
            for line in plane.lines:
                if "Stream" in line.name:
                    yield from line.events


def kind_of(name):
    found = (kind for part, kind in KINDS.items() if part in name)
    return next(found, "elementwise and copies")
