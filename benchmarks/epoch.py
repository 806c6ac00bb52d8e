"""An epoch of fine-tuning a sentence encoder on a processor, beside the peers.

python benchmarks/epoch.py [--rounds 5] [--sentences 512] [--preset FOLDER]

all-MiniLM-L6-v2 learns the UCI sentiment sentences as in
`examples/finetune_sentiment.py`: LoRA of rank 8 on the six projections of every
block, a head that trains in full, AdamW, 32 sentences of 48 tokens per step.
Ours and Keras' `enable_lora` on each backend through `fit`, PEFT with
transformers in a plain loop. Every row is a process that has loaded and
compiled; in each round each trains one epoch, one after the other, so that a
busy machine slows all of them alike. Printed are the median seconds, the median
of the paired ratios to PEFT and to ours on the same backend, and quartiles.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

BACKENDS = ("tensorflow", "jax", "torch")
ROWS = {
    **{f"ours, {backend}": backend for backend in BACKENDS},
    **{f"enable_lora, {backend}": backend for backend in BACKENDS},
    "PEFT": "torch",
}
PROJECTIONS = (
    "query",
    "key",
    "value",
    "attention_output",
    "feedforward_intermediate_dense",
    "feedforward_output_dense",
)
RANK, RATE, BATCH = 8, 2e-3, 32


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sentences", type=int, default=512)
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
    parser.add_argument("--preset", default=None)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.preset, *options.work)
        return
    from runs.data import installed_preset

    preset = options.preset or installed_preset()
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder, "arrays.npz")
        write_arrays(preset, options.sentences, arrays)
        times = measure(preset, options.rows, options.rounds, arrays)
    table(times)


def write_arrays(preset, count, path):
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import finetune_sentiment as sentiment

    texts, labels = sentiment.load_sentences("train")
    inputs = sentiment.build_preprocessor(preset)(texts[:count])
    arrays = {name: np.asarray(value) for name, value in inputs.items()}
    np.savez(path, labels=labels[:count], **arrays)


def measure(preset, rows, rounds, arrays):
    """`{row: [seconds of each round]}`."""
    workers = {}
    for name in rows:
        command = [sys.executable, __file__, "--preset", str(preset)]
        workers[name] = subprocess.Popen(
            [*command, "--work", name, str(arrays)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "KERAS_BACKEND": ROWS[name]},
        )
        seconds(workers[name])
    times = {name: [] for name in rows}
    for _ in range(rounds):
        for name, worker in workers.items():
            times[name].append(seconds(worker))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return times


def seconds(worker):
    """Of one epoch of a worker."""
    worker.stdin.write("\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line.startswith("{"):
        sys.exit(f"{worker.args[-2]} failed: {line!r}")
    return json.loads(line)["seconds"]


def work(preset, name, path):
    """Trains an epoch for every line that it is sent."""
    arrays = dict(np.load(path))
    labels = arrays.pop("labels")
    answers, sys.stdout = sys.stdout, sys.stderr
    make = peft_epoch if name == "PEFT" else keras_epoch
    epoch = make(preset, name, arrays, labels)
    for _ in sys.stdin:
        start = time.perf_counter()
        epoch()
        took = time.perf_counter() - start
        print(json.dumps({"seconds": took}), file=answers, flush=True)


def keras_epoch(preset, name, inputs, labels):
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import keras
    from finetune_sentiment import build_classifier

    import keras_peft

    model = build_classifier(preset)
    if name.startswith("ours"):
        keras_peft.adapt(model, keras_peft.LoRA(rank=RANK), PROJECTIONS)
    else:
        backbone = next(x for x in model.layers if isinstance(x, keras.Model))
        backbone.enable_lora(RANK, target_layer_names=list(PROJECTIONS))
    model.compile(
        keras.optimizers.AdamW(RATE, weight_decay=0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return lambda: model.fit(inputs, labels, batch_size=BATCH, verbose=0)


def peft_epoch(preset, name, inputs, labels):
    import peft
    import torch
    import transformers

    class Classifier(torch.nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder = encoder
            self.dropout = torch.nn.Dropout(0.1)
            self.logits = torch.nn.Linear(encoder.config.hidden_size, 2)

        def forward(self, input_ids, attention_mask, token_type_ids):
            hidden = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
            ).last_hidden_state
            mask = attention_mask[..., None].to(hidden.dtype)
            pooled = (hidden * mask).sum(1) / mask.sum(1)
            return self.logits(self.dropout(pooled))

    encoder = transformers.BertModel.from_pretrained(preset)
    targets = r"encoder\.layer\..*\.(query|key|value|dense)"
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
    model = Classifier(peft.get_peft_model(encoder, config)).train()
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=RATE, weight_decay=0.01)
    names = dict(
        input_ids="token_ids",
        attention_mask="padding_mask",
        token_type_ids="segment_ids",
    )
    tensors = [torch.as_tensor(inputs[x]).long() for x in names.values()]
    targets = torch.as_tensor(labels)

    def epoch():
        order = torch.randperm(len(targets))
        for rows in torch.split(order, BATCH):
            logits = model(*(tensor[rows] for tensor in tensors))
            loss = torch.nn.functional.cross_entropy(logits, targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def table(times):
    print("| row | seconds | over PEFT | over ours |")
    print("|---|---|---|---|")
    for name, found in times.items():
        ours = f"ours, {ROWS[name]}"
        columns = [
            ratio(found, times[other]) if other in times else ""
            for other in ("PEFT", ours)
        ]
        middle = f"{np.median(found):.2f}"
        print(f"| {name} | {middle} | {' | '.join(columns)} |")


def ratio(found, others):
    """The median of paired ratios, and its quartiles."""
    ratios = np.divide(found, others)
    low, middle, high = np.percentile(ratios, (25, 50, 75))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
