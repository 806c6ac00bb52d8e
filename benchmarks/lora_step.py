"""One training step on a processor: our LoRA against Keras' `enable_lora`.

A stack of six layers is trained with Adam on one batch: `Dense` with ReLU, or
`EinsumDense` with the equations of attention, into heads and out of them. All
models of a row hold the same base weights; rank 8 on every layer, biases
frozen, so that each layer trains one `A` and one `B`. On `abc,cde->abde` Keras'
factors have other shapes than a matrix of rank 8: its `A` holds one block per
head, `[inputs, heads, rank]`, and its `B`, `[rank, head_dim]`, is shared by the
heads. Ours are `[inputs, rank]` and `[rank, heads * head_dim]`. On `Dense` and
`abcd,cde->abe` the two are the same matrices.

Times: the compiled step of each model in turn in one process, so that a busy
machine slows all of them alike; medians, and the median of the paired ratios
with its quartiles. The process keeps freed memory, so that a time does not
depend on how fast the system hands out pages. Memory: a fresh process each,
which returns freed memory at once; how far the resident memory rises during
warm steps above its level before them. Weights and optimizer slots are not in
it. Exits with 1 if ours is slower or larger anywhere.

Run:
    KERAS_BACKEND=jax python benchmarks/lora_step.py [--quick]
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_peft

KINDS = ("Dense", "EinsumDense")
VARIANTS = ("full", "keras", "ours")
HIDDEN = (512, 1024)
TOKENS = (512, 1024, 2048, 4096)
LAYERS, RANK, SEQUENCE = 6, 8, 128
KEEP_FREED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
RETURN_FREED = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    # TensorFlow's oneDNN allocator keeps a pool of its own.
    "TF_ENABLE_ONEDNN_OPTS": "0",
}


def build_stack(kind, hidden):
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((SEQUENCE, hidden))
    for index in range(LAYERS):
        if kind == "Dense":
            layer = keras.layers.Dense(hidden, activation="relu")
        elif index % 2 == 0:
            layer = keras.layers.EinsumDense(
                "abc,cde->abde", (None, hidden // 64, 64), bias_axes="de"
            )
        else:
            layer = keras.layers.EinsumDense(
                "abcd,cde->abe", (None, hidden), bias_axes="e"
            )
        x = layer(x)
    return keras.Model(inputs, x)


def build_model(kind, hidden, variant):
    model = build_stack(kind, hidden)
    layers = model.layers[1:]
    if variant == "keras":
        for layer in layers:
            layer.enable_lora(RANK)
            layer.bias.trainable = False
    elif variant == "ours":
        targets = [layer.name for layer in layers]
        keras_peft.adapt(model, keras_peft.LoRA(RANK), targets, head=[])
    model.compile(keras.optimizers.Adam(1e-3), "mse")
    return model


def make_batch(hidden, tokens):
    rng = np.random.default_rng(0)
    shape = (2, tokens // SEQUENCE, SEQUENCE, hidden)
    pair = rng.normal(size=shape).astype("float32")
    return [keras.ops.convert_to_tensor(values) for values in pair]


def warm_up(model, batch):
    """Compiles, and checks that exactly the trainable variables move."""
    before = [np.array(value) for value in model.get_weights()]
    for _ in range(3):
        model.train_on_batch(*batch)
    moved = [
        variable.path
        for variable, old in zip(model.weights, before, strict=True)
        if np.any(keras.ops.convert_to_numpy(variable) != old)
    ]
    trained = [variable.path for variable in model.trainable_weights]
    if sorted(moved) != sorted(trained) or len(moved) != 2 * LAYERS:
        raise AssertionError(f"trainable: {trained}, moved: {moved}")


def time_steps(kind, hidden, tokens, seconds):
    """Seconds, `[rounds][variants]`."""
    batch = make_batch(hidden, tokens)
    models = [build_model(kind, hidden, variant) for variant in VARIANTS]
    for model in models:
        warm_up(model, batch)
    rounds, end = [], time.perf_counter() + seconds
    while len(rounds) < 9 or time.perf_counter() < end:
        times = [0.0] * len(models)
        # The order turns, so that no model always follows the same one.
        for index in np.roll(range(len(models)), len(rounds)):
            start = time.perf_counter()
            models[index].train_on_batch(*batch)
            times[index] = time.perf_counter() - start
        rounds.append(times)
    return rounds


def resident(field):
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 1024


def measure_memory(kind, hidden, tokens, variant):
    """MiB by which the resident memory rises during warm steps."""
    batch = make_batch(hidden, tokens)
    model = build_model(kind, hidden, variant)
    warm_up(model, batch)
    level = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
    for _ in range(3):
        model.train_on_batch(*batch)
    return resident("VmHWM") - level


def in_process(settings, measure, *arguments):
    """Result of `measure` in a fresh process with `settings` of malloc."""
    command = [sys.executable, __file__, "--child", measure.__name__]
    command.append(json.dumps(arguments))
    output = subprocess.check_output(command, env=os.environ | settings)
    return json.loads(output.splitlines()[-1])


def compare(kind, hidden, tokens, seconds):
    """Prints one row; returns the ratios, ours to Keras', that must be < 1."""
    row = kind, hidden, tokens
    times = np.array(in_process(KEEP_FREED, time_steps, *row, seconds))
    full, native, ours = 1000 * np.median(times, axis=0)
    low, ratio, high = np.quantile(times[:, 2] / times[:, 1], (0.25, 0.5, 0.75))
    memory = [
        in_process(RETURN_FREED, measure_memory, *row, each)
        for each in VARIANTS
    ]
    print(
        f"{kind:11} {hidden:6} {tokens:6} | {full:7.1f} {native:7.1f} "
        f"{ours:7.1f}  {ratio:.2f} ({low:.2f}-{high:.2f}) {len(times):4} | "
        f"{memory[0]:7.1f} {memory[1]:7.1f} {memory[2]:7.1f}  "
        f"{memory[2] / memory[1]:.2f}",
        flush=True,
    )
    return ratio, memory[2] / memory[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two sizes only")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, values = arguments.child
        return print(json.dumps(globals()[name](*json.loads(values))))
    hidden_sizes = HIDDEN[:1] if arguments.quick else HIDDEN
    token_counts = TOKENS[::3] if arguments.quick else TOKENS
    seconds = 3 if arguments.quick else 8
    columns = f"{'full':>7} {'keras':>7} {'ours':>7}"
    print(
        f"{keras.backend.backend():11} hidden tokens | {columns}  ms, ratio"
        f"{'(quartiles), n':>17} | {columns}  MiB, ratio"
    )
    ratios = [
        compare(kind, hidden, tokens, seconds)
        for kind in KINDS
        for hidden in hidden_sizes
        for tokens in token_counts
    ]
    worst = np.max(ratios, axis=0)
    print(f"largest ratio: {worst[0]:.2f} of time, {worst[1]:.2f} of memory")
    sys.exit(int(worst.max() > 1.0))


if __name__ == "__main__":
    main()
