"""Training steps of language models on two GPUs of one host, beside one.

python benchmarks/train_gpus.py [--rows A B] [--results FILE] [--small]
python benchmarks/train_gpus.py table [--results FILE]

The models of `benchmarks/train_gpu.py`, with 8 rows of 1024 tokens for each
GPU, and one of 8 billion parameters (the shape of Llama 3.1 8B) that is created
in parts: no GPU ever holds it whole. Rows are processes, one after the other.
Efficiency is tokens per second by those of the same model and library on one
GPU, times the number of GPUs; memory is the peak of the first GPU. On torch,
steps are recorded. `--small` is a few thousand parameters on devices that a
processor pretends to have, which records nothing.
"""

import json
import os
import subprocess
import sys

from runs.rows import options_of
from runs.rows import write_row
from train_gpu import EIGHT
from train_gpu import SHAPE
from train_gpu import SMALL

SHAPES = {"1B": SHAPE, "8B": SHAPE | EIGHT}
# `{row: (backend, shape, number of GPUs, distribution, prepare)}`.
ROWS = {
    "jax": ("jax", "1B", 1, None, {}),
    "jax, data parallel": ("jax", "1B", 2, "data", {}),
    "jax, fully sharded": ("jax", "1B", 2, "sharded", dict(remat="full")),
    "jax 8B, fully sharded": ("jax", "8B", 2, "sharded", dict(remat="full")),
    "torch": ("torch", "1B", 1, None, dict(capture=True)),
    "torch, data parallel": ("torch", "1B", 2, None, dict(capture=True)),
}


def main():
    options = options_of(ROWS, "build/train_gpus.jsonl")
    if options.job:
        work(options)
        return
    if options.command != "table":
        for name in options.rows:
            run(name, options.small)
    table(options.results)


def run(name, small):
    """Starts one row, and torchrun for torch on several GPUs."""
    backend, _, gpus, *_ = ROWS[name]
    launch = []
    if backend == "torch" and gpus > 1:
        processes = ["--standalone", f"--nproc-per-node={gpus}"]
        launch = ["-m", "torch.distributed.run", *processes]
    devices = ",".join(map(str, range(gpus)))
    environment = {
        "KERAS_BACKEND": backend,
        "CUDA_VISIBLE_DEVICES": "" if small else devices,
    }
    if small:
        flag = f"--xla_force_host_platform_device_count={gpus}"
        environment["XLA_FLAGS"] = flag
    done = subprocess.run(
        [sys.executable, *launch, __file__, *sys.argv[1:], "--job", name],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        print(f"{name} failed:", done.stderr[-1500:], flush=True)


def work(options):
    """Measures one row, in each process of it."""
    backend, size, gpus, kind, prepare = ROWS[options.job]
    shape = dict(SHAPES[size])
    if options.small:
        shape.update(SMALL)
        prepare = {k: v for k, v in prepare.items() if k != "capture"}
    shape["rows"] *= gpus
    rank = start_process() if backend == "torch" and gpus > 1 else 0
    if kind is not None:
        distribute(kind)
    from runs import train_keras

    # Files to lock, of which every process needs its own.
    locks = options.results.with_name(f"{options.results.stem}-{rank}.jsonl")
    processes = gpus if backend == "torch" else 1
    found = train_keras.measure(
        locks, **shape, prepare=prepare, processes=processes
    )
    if rank == 0:
        write_row(options, shape, found, gpus=gpus)


def start_process():
    """The number of this process, which gets the GPU of that number."""
    import torch

    rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group()
    return rank


def distribute(kind):
    import keras

    import keras_peft

    distribution = (
        keras.distribution.DataParallel()
        if kind == "data"
        else keras_peft.training.FullyShardedDataParallel()
    )
    keras.distribution.set_distribution(distribution)


def table(path):
    print("| row | GPUs | ms/step | tokens/s | efficiency | peak GiB per GPU |")
    print("|---|---|---|---|---|---|")
    lines = path.read_text().splitlines()
    rows = {row["row"]: row for row in map(json.loads, lines)}
    for name, row in rows.items():
        backend, size, gpus, *_ = ROWS[name]
        efficiency = ""
        if size == "1B" and backend in rows:
            one = rows[backend]["tokens_per_s"]
            efficiency = f"{row['tokens_per_s'] / (gpus * one):.1%}"
        print(
            f"| {name} | {gpus} | {1000 * row['step']:.1f} "
            f"| {row['tokens_per_s']:,.0f} | {efficiency} "
            f"| {row['peak_gib']:.2f} |"
        )


if __name__ == "__main__":
    main()
