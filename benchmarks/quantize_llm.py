r"""What quantization costs a fine-tuned language model, and how to pay less.

python benchmarks/quantize_llm.py arrays WORK --preset PRESET
python benchmarks/quantize_llm.py train WORK --preset PRESET \
    --task novel --adapter FOLDER [--float] [--epochs 4]
python benchmarks/quantize_llm.py measure WORK --preset PRESET \
    --task novel --adapter FOLDER

`arrays` makes `WORK/TASK.npz` of the texts in `examples/data`. `train` goes on
training the model with the float adapter of `FOLDER` merged, for as many steps
as that one was trained, in the integers that will be shipped (or with
`--float` in floating point, for comparison), and writes the adapter into WORK.
`measure` prints the table of `docs/quantization.md`: what each way of storing
the merged model loses on text it has not seen.

The last two need Keras, keras-hub and any backend, and no tokenizer. Kernels
are measured as the float32 arrays that ONNX Runtime computes with.
"""

import argparse
from pathlib import Path

import numpy as np


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=("arrays", "train", "measure"))
    parser.add_argument("work", type=Path)
    parser.add_argument("--preset", type=Path, required=True)
    parser.add_argument("--task", choices=("dialogue", "novel"))
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--bits", choices=("int4", "int8"), default="int4")
    parser.add_argument("--float", action="store_true")
    parser.add_argument("--epochs", type=int)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    commands = {"arrays": write_arrays, "train": train, "measure": measure}
    commands[arguments.command](arguments)


def write_arrays(arguments):
    from runs import quantize_data

    for task in quantize_data.TASKS:
        parts = quantize_data.load(task, arguments.preset)
        calibration = parts.pop("calibration")
        arrays = {
            f"{part}/{name}": array
            for part, named in parts.items()
            for name, array in named.items()
        }
        np.savez_compressed(
            arguments.work / f"{task}.npz", calibration=calibration, **arrays
        )


def read_arrays(work, task):
    """`{"train": {...}, "test": {...}, "calibration": rows}`."""
    parts = {}
    with np.load(work / f"{task}.npz") as arrays:
        for key in arrays.files:
            part, _, name = key.partition("/")
            if name:
                parts.setdefault(part, {})[name] = arrays[key]
            else:
                parts[part] = arrays[key]
    return parts


def train(arguments):
    from runs import quantize_training

    kind = "float" if arguments.float else arguments.bits
    times = f"-{arguments.epochs}" if arguments.epochs else ""
    output = arguments.work / f"{arguments.task}-{kind}{times}"
    found = quantize_training.train(
        arguments.task,
        read_arrays(arguments.work, arguments.task),
        arguments.preset,
        arguments.adapter,
        output,
        None if arguments.float else arguments.bits,
        arguments.epochs,
    )
    print(output.name, found, flush=True)


def measure(arguments):
    from runs import quantize_measuring

    arrays = read_arrays(arguments.work, arguments.task)
    rows = quantize_measuring.table(
        arrays,
        arguments.preset,
        arguments.adapter,
        sorted(arguments.work.glob(f"{arguments.task}-*/")),
    )
    text = "\n".join(rows)
    (arguments.work / f"{arguments.task}.md").write_text(text + "\n")
    print(f"\n{arguments.task}\n{text}", flush=True)


if __name__ == "__main__":
    main()
