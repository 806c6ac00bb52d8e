"""Compares the forms of an exported model on speed and on labeled data."""

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_peft.export import measure
from keras_peft.export import samples
from keras_peft.export.report import ExportReport
from keras_peft.export.report import Step
from keras_peft.export.result import Forward
from keras_peft.export.result import ModelFile
from keras_peft.export.result import Verification
from keras_peft.export.signature import Signature
from keras_peft.export.signature import read_signature

# One core is what a small device has, and what a busy server leaves.
THREADS = 1
TYPICAL_LENGTH = 64


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Labeled samples, in rows of inputs that the graph takes.

    Attributes:
        batches: Inputs by name, a few rows each.
        labels: One label per row, over all batches.
        texts: The rows as texts, where they were given so.
    """

    batches: Sequence[Mapping[str, np.ndarray]]
    labels: Any
    texts: Sequence[str] | None = None


def assess(
    model: keras.Model,
    files: Mapping[str, ModelFile],
    checks: Sequence[Verification],
    evaluation: Evaluation | None = None,
    labels: Sequence[str] | None = None,
) -> ExportReport:
    """Measures Keras and every file side by side.

    Args:
        model: The Keras model that was exported.
        files: `{"float32": file, "int8": file}`, the one to ship last.
        checks: How far each file is from Keras.
        evaluation: Labeled samples to measure accuracy on.
        labels: Names of the classes.
    """
    signature = read_signature(model)
    forms = {"keras": _keras_form(model, signature)}
    forms |= {n: file.runner(THREADS) for n, file in files.items()}
    batch = _typical_batch(model, signature, evaluation)
    times = measure.median_latencies(forms, batch)
    sizes = {"keras": sum(num_bytes(v) for v in model.variables)}
    sizes |= {name: file.num_bytes for name, file in files.items()}
    steps = {name: Step(name, sizes[name], times[name]) for name in forms}
    for check in checks:
        steps[check.step] = dataclasses.replace(
            steps[check.step],
            max_abs=check.max_abs,
            relative=check.relative,
            cosine=check.cosine,
        )
    shipped = [*files.values()][-1]
    report = ExportReport(
        model.name,
        tuple(steps.values()),
        _in_words(batch, len(forms), shipped.runtime),
        format=shipped.format,
    )
    if evaluation is None:
        return report
    return _add_accuracy(report, forms, evaluation, labels)


def _keras_form(model: keras.Model, signature: Signature) -> Forward:
    def forward(batch: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        outputs = keras.tree.flatten(signature.call(model, dict(batch)))
        return [keras.ops.convert_to_numpy(output) for output in outputs]

    return forward


def num_bytes(variable: keras.Variable) -> int:
    """What a variable takes in Keras."""
    itemsize = np.dtype("float32").itemsize
    if keras.backend.standardize_dtype(variable.dtype) in (
        "bfloat16",
        "float16",
    ):
        itemsize = 2
    return int(np.prod(variable.shape)) * itemsize


def _typical_batch(
    model: keras.Model, signature: Signature, evaluation: Evaluation | None
) -> Mapping[str, np.ndarray]:
    """One sample: the user's first, or one of a typical length."""
    if evaluation is not None:
        return {n: v[:1] for n, v in evaluation.batches[0].items()}
    sizes = dict(samples.check_sizes(model, signature)[0]) | {"batch": 1}
    for spec in signature.inputs:
        if spec.name == "token_ids" and isinstance(spec.shape[-1], str):
            sizes[spec.shape[-1]] = min(
                TYPICAL_LENGTH, samples.longest_sequence(model)
            )
    return samples.make_batch(model, signature, sizes, seed=3)


def _in_words(
    batch: Mapping[str, np.ndarray], num_forms: int, runtime: str
) -> str:
    shapes = ", ".join(f"{name} {value.shape}" for name, value in batch.items())
    return (
        f"Median of 15 calls, the {num_forms} forms taking turns; one sample, "
        f"{shapes}. {runtime} on {THREADS} processor thread; Keras called "
        f"directly on {keras.config.backend()}, with its own threads."
    )


def _add_accuracy(
    report: ExportReport,
    forms: Mapping[str, Forward],
    evaluation: Evaluation,
    labels: Sequence[str] | None,
) -> ExportReport:
    outputs = {
        name: measure.first_outputs(forward, evaluation.batches)
        for name, forward in forms.items()
    }
    truth = measure.class_ids(evaluation.labels, outputs["keras"])
    base = measure.classes(outputs["keras"])
    found = {name: measure.classes(value) for name, value in outputs.items()}
    steps = tuple(
        dataclasses.replace(
            step,
            accuracy=float((found[step.name] == truth).mean()),
            agreement=float((found[step.name] == base).mean()),
        )
        for step in report.steps
    )
    worst = measure.worst_samples(
        outputs["keras"],
        outputs[steps[-1].name],
        truth,
        evaluation.texts,
        labels,
    )
    return dataclasses.replace(
        report, steps=steps, num_samples=len(truth), worst_samples=worst
    )
