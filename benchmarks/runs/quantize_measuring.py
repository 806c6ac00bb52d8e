"""Loss, divergence and agreement of every variant, beside the float model."""

import time

import keras
import numpy as np
from runs.quantize_data import CHUNKS
from runs.quantize_training import base
from runs.quantize_training import inputs_of
from runs.quantize_training import merged
from runs.quantize_variants import Model
from runs.quantize_variants import variants

import keras_peft
from keras_peft import quantize_aware

HEADER = (
    "| variant | MB | loss | change ± SE | divergence | same first choice |",
    "| --- | --- | --- | --- | --- | --- |",
)


class Chunks:
    """What is measured, in parts, with the float model's answers.

    Attributes:
        losses: Mean loss per token of the float model, by part.
    """

    def __init__(self, model, part):
        count = len(part["tokens"])
        order = np.array_split(np.arange(count), CHUNKS)
        self.parts = [{k: v[i] for k, v in part.items()} for i in order]
        answers = [answer(model, part) for part in self.parts]
        self.losses = np.array([loss for loss, _ in answers])
        self.chosen = [found for _, found in answers]

    def measure(self, model):
        """`(losses by part, mean divergence, share of same first choices)`."""
        losses, divergences, same = [], [], []
        ops = keras.ops
        for part, reference in zip(self.parts, self.chosen, strict=True):
            loss, found = answer(model, part)
            losses.append(loss)
            divergences.append(
                ops.mean(ops.sum(ops.exp(reference) * (reference - found), -1))
            )
            agree = ops.argmax(reference, -1) == ops.argmax(found, -1)
            same.append(ops.mean(ops.cast(agree, "float32")))
        means = [
            float(np.mean([float(x) for x in xs])) for xs in (divergences, same)
        ]
        return np.array(losses), *means


def answer(model, part):
    """`(mean loss, log probabilities)` where the targets count."""
    logits = model.predict_on_batch(inputs_of(part["tokens"], part["mask"]))
    counted = part["weights"] > 0
    found = keras.ops.convert_to_tensor(logits[counted])
    found = keras.ops.log_softmax(found)
    targets = part["targets"][counted][:, None]
    likely = keras.ops.take_along_axis(found, targets, axis=1)
    return -float(keras.ops.mean(likely)), found


def table(arrays, preset, adapter, folders):
    """The rows of the table; `folders` are those that `train` wrote."""
    before = base(preset)
    tuned = merged(preset, adapter)
    chunks = Chunks(tuned, arrays["test"])
    rows = [*HEADER, _row("merged, float32", None, chunks.losses, chunks)]
    losses, *rest = chunks.measure(before)
    rows.append(
        _row("before fine-tuning, float32", None, losses, chunks, *rest)
    )
    trained = {}
    for folder in folders:
        keras_peft.load_adapter(tuned, folder)
        if found := quantize_aware.integers(tuned):
            trained[folder.name] = found
        else:
            losses, *rest = chunks.measure(tuned)
            name = f"trained on, {folder.name}"
            rows.append(_row(name, None, losses, chunks, *rest))
        keras_peft.remove(tuned)
    model = Model(tuned, arrays["calibration"])
    size = model.put_table(8)
    rows.append(_row("table in int8", None, *_measured(model, chunks)))
    start = time.perf_counter()
    for name, stored in variants(model, trained):
        seconds = time.perf_counter() - start
        model.put(stored)
        model.put_table(8)
        found = chunks.measure(model.model)
        bytes_ = size + sum(kernel.nbytes for kernel in stored.values())
        rows.append(_row(name, bytes_, found[0], chunks, *found[1:]))
        print(f"{rows[-1]} {seconds:.0f} s", flush=True)
        start = time.perf_counter()
    return rows


def _measured(model, chunks):
    losses, *rest = chunks.measure(model.model)
    return losses, chunks, *rest


def _row(name, size, losses, chunks, divergence=0.0, same=1.0):
    change = losses - chunks.losses
    error = change.std(ddof=1) / len(change) ** 0.5
    megabytes = "" if size is None else f"{size / 1e6:.1f}"
    return (
        f"| {name} | {megabytes} | {losses.mean():.4f} | "
        f"{change.mean():+.4f} ± {error:.4f} | {divergence:.4f} | {same:.3f} |"
    )
