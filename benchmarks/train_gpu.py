"""Training steps of a language model on one GPU, beside PEFT and Keras.

python benchmarks/train_gpu.py [--rows A B] [--results FILE] [--small]
python benchmarks/train_gpu.py table [--results FILE]

A Llama of 1.2 billion random parameters (the shape of Llama 3.2 1B) in
bfloat16 is trained on 8 rows of 1024 random tokens with AdamW; LoRA has rank
16 on all seven projections, and float32 factors. Each row of the table is a
process. The processes of a group start together, and each is measured while no
other one uses the GPU. `fit` trains with numpy arrays, `verbose=0` and no
callback; PEFT in a plain loop. Time is the mean of 40 steps (PEFT: 20) that
follow each other without waiting, the better of two turns; memory is the peak
that the library's allocator reports. `--small` is a few thousand parameters, to
try this without a GPU.
"""

import json
import os
import subprocess
import sys
import time

from runs.rows import options_of
from runs.rows import write_row

SHAPE = dict(
    vocabulary=128256,
    layers=16,
    heads=32,
    key_heads=8,
    hidden=2048,
    inner=8192,
    rank=16,
    rows=8,
    length=1024,
)
SMALL = dict(
    vocabulary=512,
    layers=2,
    heads=4,
    key_heads=2,
    hidden=64,
    inner=128,
    rank=4,
    rows=2,
    length=64,
)
# What makes it the shape of Llama 3.1 8B.
EIGHT = dict(layers=32, hidden=4096, inner=14336, tied=False)
# `{row: (backend or "peft", settings)}`, by groups whose memory fits together:
# what a process has asked for once, it keeps.
GROUPS = (
    {
        "prepared": ("jax", dict(prepare={})),
        "PEFT": ("peft", {}),
        "prepared on torch": ("torch", dict(prepare=dict(capture=True))),
    },
    {
        "prepared, remat dots": ("jax", dict(prepare=dict(remat="dots"))),
        "prepared, remat full": ("jax", dict(prepare=dict(remat="full"))),
        "PEFT, checkpointed": ("peft", dict(checkpoint=True)),
        "prepared, NF4": ("jax", dict(prepare={}, base="nf4")),
        "prepared, NF4, remat full": (
            "jax",
            dict(prepare=dict(remat="full", chunk_size=512), base="nf4"),
        ),
        "8B, NF4, remat full": (
            "jax",
            dict(
                prepare=dict(remat="full"),
                base="nf4",
                rows=1,
                length=2048,
                **EIGHT,
            ),
        ),
        "PEFT, NF4, checkpointed": ("peft", dict(checkpoint=True, base="nf4")),
    },
    {
        "enable_lora": ("jax", dict(lora="keras")),
        "adapted": ("jax", {}),
        "prepared, bare step": ("jax", dict(prepare={}, bare=True)),
    },
    {
        "prepared, dropout": (
            "jax",
            dict(prepare={}, method=("LoRA", dict(rank=16, dropout=0.1))),
        ),
        "PEFT, compiled": ("peft", dict(compile=True)),
        "PEFT, NF4": ("peft", dict(base="nf4")),
    },
    {
        "full": ("jax", dict(lora=None)),
        "prepared, bottleneck": (
            "jax",
            dict(prepare={}, method=("BottleneckAdapter", dict(reduction=32))),
        ),
        "prepared, DoRA": (
            "jax",
            dict(prepare={}, method=("LoRA", dict(rank=16, decompose=True))),
        ),
    },
)
ROWS = {name: row for group in GROUPS for name, row in group.items()}


def main():
    options = options_of(ROWS, "build/train_gpu.jsonl")
    if options.job:
        work(options)
    elif options.command != "table":
        run(options)
    if not options.job:
        table(options.results)


def work(options):
    """Measures one row."""
    backend, settings = ROWS[options.job]
    shape = SHAPE | settings
    if options.small:
        shape |= SMALL
    if backend == "peft":
        from runs import train_peft as library
    else:
        from runs import train_keras as library
    found = library.measure(options.results, **shape)
    write_row(options, shape, found, backend=backend)


def run(options):
    for group in GROUPS:
        running = {}
        for name in (name for name in group if name in options.rows):
            log = options.results.with_suffix(f".{len(running)}.log")
            running[name] = (
                log,
                subprocess.Popen(
                    [sys.executable, __file__, *sys.argv[1:], "--job", name],
                    stdout=subprocess.DEVNULL,
                    stderr=log.open("w"),
                    env={
                        **os.environ,
                        "KERAS_BACKEND": group[name][0].replace(
                            "peft", "torch"
                        ),
                        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
                    },
                ),
            )
            # So that they do not all ask for the memory of weights at once.
            time.sleep(1)
        for name, (log, process) in running.items():
            if process.wait():
                print(f"{name} failed:", log.read_text()[-1500:], flush=True)
            log.unlink()


def table(path):
    print("| row | backend | ms/step | tokens/s | peak GiB | first step, s |")
    print("|---|---|---|---|---|---|")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        print(
            f"| {row['row']} | {row['backend']} | {1000 * row['step']:.1f} "
            f"| {row['tokens_per_s']:,.0f} | {row['peak_gib']:.2f} "
            f"| {row['first_step']:.1f} |"
        )
    for row in rows:
        if row.get("kernels"):
            times = row["kernels"].items()
            times = ", ".join(f"{kind} {time:.1f}" for kind, time in times)
            print(f"Kernels of {row['row']}, ms in a step: {times}.")


if __name__ == "__main__":
    main()
