"""A language model with two adapters over one int4 base, on real weights.

python examples/quickstart_llm.py ["A question to ask." ...]

Fine-tunes SmolLM2-135M with LoRA, once on short dialogues and once on a novel,
exports the model in 4 bits with both adapters beside it, and asks it the same
question as it is, with the one and with the other. Offline, under fifteen
minutes on two cores.
"""

import json
import os
import subprocess
import sys
import time
import webbrowser
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_hub
from rich.console import Console
from rich.table import Table
from smollm2 import smollm2

import keras_peft

DATA = Path(__file__).parent / "data"
OUTPUT = Path("quickstart-llm-output")
APP = OUTPUT / "app"
QUESTIONS = ("What do you think of marriage?",)
STEPS = 24
# Characters of a novel that make about as many tokens as a row has.
PASSAGE = 480


def dialogues(split):
    """Prompts and responses, as the model was taught to see them."""
    with (DATA / "chatterbot_en.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [
        f"<|im_start|>user\n{row['prompt']}<|im_end|>\n"
        f"<|im_start|>assistant\n{row['response']}<|im_end|>"
        for row in rows
        if row["split"] == split
    ]


def passages(novel):
    """A novel in pieces of whole lines."""
    found = [""]
    for line in (DATA / novel).read_text("utf-8").splitlines(keepends=True):
        if len(found[-1]) > PASSAGE:
            found.append("")
        found[-1] += line
    return found


def read_tasks():
    """`{name: (texts to train on and to test on, tokens, rows of a batch)}`."""
    return {
        "dialogues": (dialogues("train"), dialogues("test"), 64, 16),
        "novel": (
            passages("austen_persuasion.txt"),
            passages("austen_northangerabbey.txt"),
            128,
            8,
        ),
    }


def load():
    """The model, with the tokenizer and the settings it was trained with."""
    folder = smollm2(OUTPUT / "smollm2")
    model = keras_hub.models.CausalLM.from_preset(str(folder), dtype="float32")
    for line in keras_peft.check_base(model, folder, mend=True):
        print("keras-hub differs:", line)
    return model


def compile_for(model, steps):
    rate = keras.optimizers.schedules.PolynomialDecay(4e-4, steps)
    model.compile(
        optimizer=keras.optimizers.AdamW(rate, weight_decay=0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        # Of each token alike: padding has no weight.
        weighted_metrics=[
            keras.metrics.SparseCategoricalCrossentropy(
                from_logits=True, name="nll"
            )
        ],
    )


def held_out(model, texts, rows):
    found = model.evaluate(texts, batch_size=rows, verbose=0, return_dict=True)
    return found["nll"]


def train(model, name, task):
    """Trains an adapter and leaves the model as it was; returns its losses."""
    texts, test, length, rows = task
    model.preprocessor.sequence_length = length
    keras_peft.adapt(model, keras_peft.LoRA(rank=8), targets="all-linear")
    compile_for(model, STEPS)
    before = held_out(model, test[: 4 * rows], rows)
    model.fit(texts[: STEPS * rows], batch_size=rows, verbose=0)
    after = held_out(model, test[: 4 * rows], rows)
    keras_peft.save_adapter(model, OUTPUT / name)
    keras_peft.remove(model)
    return before, after


def main(questions):
    start = time.perf_counter()
    OUTPUT.mkdir(exist_ok=True)
    keras.utils.set_random_seed(0)
    tasks = read_tasks()
    model = load()
    table = Table(title="Loss of held-out tokens")
    for column in ("Adapter", "Before", "After", "On disk"):
        table.add_column(column, justify="right")
    for name, task in tasks.items():
        print(f"Fine-tuning on {name}: {STEPS} steps.")
        before, after = train(model, name, task)
        size = folder_size(OUTPUT / name)
        table.add_row(
            name, f"{before:.3f}", f"{after:.3f}", f"{size / 1e6:.1f} MB"
        )
    Console().print(table)

    print("Exporting in 4 bits with both adapters, and checking the folder.")
    texts = tasks.values()
    report = keras_peft.export.to_genai(
        model,
        APP,
        quantize="int4",
        calibration=[text for task in texts for text in task[0][:16]],
        evaluation=[text for task in texts for text in task[1][:8]],
        hf_folder=OUTPUT / "smollm2",
        adapters={name: OUTPUT / name for name in tasks},
    )
    print(report)
    print(f"To ship: {APP}, {folder_size(APP) / 1e6:.0f} MB")
    print(f"{time.perf_counter() - start:.0f} seconds in all.\n")
    answer(questions or QUESTIONS, tasks)
    webbrowser.open((APP / "report.html").resolve().as_uri())


def folder_size(folder):
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def answer(questions, adapters):
    """Asks the exported folder: onnxruntime-genai alone, no Keras."""
    chat = [sys.executable, "-m", "keras_peft_cli.main", "chat", str(APP)]
    for question in questions:
        print(f"> {question}")
        for name in (None, *adapters):
            print(f"[{name or 'as it is'}] ", end="", flush=True)
            adapter = ["--adapter", name] if name else []
            command = [*chat, "--max-tokens", "60", *adapter]
            subprocess.run(command, input=question, text=True, check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
