"""From a Keras model to a folder that a device can run."""

import dataclasses
import json
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras

from keras_peft.export import samples as inputs
from keras_peft.export.adapters import adapter_problems
from keras_peft.export.adapters import taken_positions
from keras_peft.export.assess import Evaluation
from keras_peft.export.assess import assess
from keras_peft.export.batches import Rows
from keras_peft.export.batches import is_texts
from keras_peft.export.batches import padding_is_free
from keras_peft.export.batches import read_rows
from keras_peft.export.build import build_onnx
from keras_peft.export.comparison import compare
from keras_peft.export.comparison import reference_outputs
from keras_peft.export.folder import check_target
from keras_peft.export.folder import read_folder
from keras_peft.export.folder import write_folder
from keras_peft.export.onnx_file import OnnxFile
from keras_peft.export.preprocessor import describe_preprocessor
from keras_peft.export.report import ExportReport
from keras_peft.export.result import ModelFile
from keras_peft.export.result import Result
from keras_peft.export.result import TensorSpec
from keras_peft.export.result import Verification
from keras_peft.export.signature import Signature
from keras_peft.export.signature import longest_sequence
from keras_peft.export.signature import read_signature

# How far a check on other samples may exceed what the export measured.
SPREAD = 10


def to_onnx(
    model: keras.Model, folder: str | Path, **options: Any
) -> ExportReport:
    """See `keras_peft.export.to_onnx`."""
    return _deploy(build_onnx, model, folder, **options)


def to_litert(
    model: keras.Model, folder: str | Path, **options: Any
) -> ExportReport:
    """See `keras_peft.export.to_litert`."""
    from keras_peft.export.litert.build import build_litert

    return _deploy(build_litert, model, folder, **options)


def _deploy(
    build: Callable[..., Result],
    model: keras.Model,
    folder: str | Path,
    quantize: str | None,
    calibration: Any,
    tolerance: float | None,
    preprocessor: Any,
    labels: Sequence[str] | None,
    evaluation: tuple[Any, Any] | None,
    merge_report: Any,
) -> ExportReport:
    if preprocessor is None:
        preprocessor = getattr(model, "preprocessor", None)
    preprocessor = preprocessor or None  # `False` leaves it out.
    _check(model, folder, preprocessor, labels, evaluation)
    signature = read_signature(model)
    specs = [TensorSpec(i.name, i.dtype, i.shape) for i in signature.inputs]
    texts = list(calibration) if is_texts(calibration) else []
    preprocessing = describe_preprocessor(preprocessor, specs, texts)
    if texts:
        rows = read_rows(texts, preprocessor, specs, trim=True)
        calibration = list(rows.batches)
    result = build(model, quantize, calibration, tolerance)
    text = preprocessing.text
    trim = text is not None and padding_is_free(
        result.float_file.runner(), preprocessor, text, specs
    )
    if trim and text is not None:
        text.pad_to_longest()
    files = {"float32": result.float_file}
    if quantize is not None:
        files[quantize] = result.file
    report = assess(
        model,
        files,
        result.verification,
        _evaluation(evaluation, preprocessor, specs, trim),
        labels,
    )
    report = dataclasses.replace(
        report,
        weights=result.file.weight_errors(result.float_file),
        weights_left_float=result.weights_left_float,
        merge_errors=dict(merge_report.errors) if merge_report else None,
        tracer=result.tracer,
        notes=result.notes,
    )
    write_folder(folder, result, preprocessing, labels, report)
    return report


def verify(
    folder: str | Path, model: keras.Model, samples: Any = None
) -> ExportReport:
    """See `keras_peft.export.verify`."""
    folder, manifest = read_folder(folder)
    problems = adapter_problems(model)
    if problems:
        raise ValueError(" ".join(problems))
    if (folder / "genai_config.json").exists():
        from keras_peft.export.genai.deploy import verify as verify_genai

        return verify_genai(folder, manifest, model, samples)
    signature = read_signature(model)
    _check_inputs(signature, manifest)
    file = _read_file(folder)
    batches = [file.admitted(b) for b in _batches(model, signature, samples)]
    references = [reference_outputs(model, signature, b) for b in batches]
    step = manifest["quantization"] or "float32"
    check = compare(file.runner(), batches, references, step)
    recorded = json.loads((folder / "report.json").read_text("utf-8"))
    last = recorded["steps"][-1]
    compare_with_export(check, last, file.rounding_bound())
    return assess(model, {step: file}, [check])


def _read_file(folder: Path) -> ModelFile:
    if (folder / OnnxFile.name).exists():
        return OnnxFile.read(folder / OnnxFile.name)
    from keras_peft.export.litert.file import LiteRtFile

    return LiteRtFile.read(folder / LiteRtFile.name)


def compare_with_export(
    check: Verification, recorded: Mapping[str, Any], rounding: float
) -> None:
    """Raises if the file is further from Keras than when it was exported."""
    relative = max(SPREAD * recorded["relative"], rounding)
    cosine = 1 - max(SPREAD * (1 - recorded["cosine"]), rounding)
    if check.relative <= relative and check.cosine >= cosine:
        return
    raise ValueError(
        "The model in the folder does not compute what this Keras model "
        "computes. Was it exported from these weights? Received: relative "
        f"difference {check.relative:.2g} and cosine {check.cosine:.5f}, where "
        f"the export measured {recorded['relative']:.2g} and "
        f"{recorded['cosine']:.5f}"
    )


def _check(
    model: keras.Model,
    folder: str | Path,
    preprocessor: Any,
    labels: Sequence[str] | None,
    evaluation: tuple[Any, Any] | None,
) -> None:
    """Finds everything that is wrong before any work is done."""
    problems = [*adapter_problems(model), *check_target(folder)]
    problems += _too_long(model, preprocessor)
    problems += _wrong_labels(model, labels)
    if evaluation is not None and len(evaluation) != 2:
        problems.append(
            "`evaluation` is a pair, `(inputs, labels)`. Received: "
            f"{len(evaluation)} parts"
        )
    if problems:
        raise ValueError("\n".join(problems))


def _too_long(model: keras.Model, preprocessor: Any) -> list[str]:
    length = getattr(preprocessor, "sequence_length", None)
    taken, room = taken_positions(model), longest_sequence(model)
    if not taken or not isinstance(length, int) or length <= room:
        return []
    return [
        f"An adapter takes {taken} positions of the model, which leaves "
        f"{room} for texts. Set `model.preprocessor.sequence_length = {room}`. "
        f"Received: a preprocessor with sequence_length={length}"
    ]


def _wrong_labels(
    model: keras.Model, labels: Sequence[str] | None
) -> list[str]:
    if labels is None:
        return []
    labels = list(labels)
    if not labels or not all(isinstance(label, str) for label in labels):
        return [f"`labels` is a list of names. Received: labels={labels!r}"]
    output = keras.tree.flatten(getattr(model, "outputs", None) or [None])[0]
    width = None if output is None else output.shape[-1]
    # One number between two classes: no, or yes.
    if width in (None, len(labels)) or (width == 1 and len(labels) == 2):
        return []
    return [
        f"`labels` needs one name per class; the model has {width}. "
        f"Received: {len(labels)} labels, {labels[:5]}"
    ]


def _evaluation(
    evaluation: tuple[Any, Any] | None,
    preprocessor: Any,
    specs: Sequence[TensorSpec],
    trim: bool,
) -> Evaluation | None:
    if evaluation is None:
        return None
    samples, labels = evaluation
    rows: Rows = read_rows(samples, preprocessor, specs, trim)
    return Evaluation(rows.batches, labels, rows.texts)


def _check_inputs(signature: Signature, manifest: Mapping[str, Any]) -> None:
    wanted = sorted(entry["name"] for entry in manifest["inputs"])
    names = sorted(spec.name for spec in signature.inputs)
    if "cache_update_index" in wanted:  # A cache takes the place of a mask.
        wanted = names if "token_ids" in names else wanted
    if names != wanted:
        raise ValueError(
            "The folder was exported from another model. It takes "
            f"{wanted}. Received: a model that takes {names}"
        )


def _batches(
    model: keras.Model, signature: Signature, samples: Any
) -> list[inputs.Batch]:
    if is_texts(samples):
        preprocessor = getattr(model, "preprocessor", None)
        specs = [TensorSpec(i.name, i.dtype, i.shape) for i in signature.inputs]
        rows = read_rows(list(samples), preprocessor, specs, trim=True)
        return [dict(batch) for batch in rows.batches]
    if samples is not None:
        return inputs.read_batches(signature, samples)
    return [
        inputs.make_batch(model, signature, sizes, seed)
        for seed, sizes in enumerate(inputs.check_sizes(model, signature))
    ]
