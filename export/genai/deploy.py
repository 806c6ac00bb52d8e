"""From a keras-hub CausalLM to a folder that onnxruntime-genai runs."""

import dataclasses
import importlib.metadata
import json
import tempfile
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras

import keras_peft
from keras_peft.export.deploy import compare_with_export
from keras_peft.export.folder import FORMAT
from keras_peft.export.folder import MANIFEST
from keras_peft.export.folder import file_entries
from keras_peft.export.folder import write_json
from keras_peft.export.genai import checks
from keras_peft.export.genai import compare
from keras_peft.export.genai import sources
from keras_peft.export.genai.config import NAME
from keras_peft.export.genai.config import genai_config
from keras_peft.export.genai.config import generation_settings
from keras_peft.export.genai.facts import Facts
from keras_peft.export.genai.judge import Judge
from keras_peft.export.genai.readme import readme
from keras_peft.export.genai.runtime import Session
from keras_peft.export.genai.shelf import Shelf
from keras_peft.export.genai.sources import Source
from keras_peft.export.genai.tokenizer import TokenizerFiles
from keras_peft.export.genai.tokenizer import write_tokenizer
from keras_peft.export.report import ExportReport
from keras_peft.export.report import Step
from keras_peft.files import whole_folder

# The same operators on the same processor, with other buffers: float32's
# rounding, or an input of a product that falls on the other side of a half
# when it is made an 8-bit integer.
SAME_KERNELS = 2.0**-7
NO_TOKENIZER = (
    "The folder has no tokenizer, since the model has no preprocessor and "
    "`tokenizer` was not given: it takes ids."
)
_PACKAGES = ("keras", "keras-hub", "onnxruntime", "onnxruntime-genai")


def to_genai(
    model: keras.Model,
    folder: str | Path,
    quantize: str | None,
    calibration: Sequence[str] | None,
    evaluation: Sequence[str] | None,
    tokenizer: Any,
    hf_folder: str | Path | None,
    context_length: int | None,
    adapters: Mapping[str, str | Path] | None,
) -> ExportReport:
    """See `keras_peft.export.to_genai`."""
    checks.check_arguments(model, folder, quantize)
    source = sources.read(model, quantize, calibration, adapters)
    shelf = Shelf(model, adapters)
    context, notes = checks.choose_context(
        source.facts, context_length, hf_folder
    )
    checks.check_room(folder, model)
    trained = tokenizer or getattr(model, "preprocessor", None)
    with whole_folder(folder) as staging:
        tokens = None
        if trained is None:
            notes.append(NO_TOKENIZER)
        else:
            tokens = write_tokenizer(
                trained, staging, hf_folder, evaluation or ()
            )
            shelf.avoid(tokens.end_ids, tokens.pad_id, tokens.start_id)
        _write_config(staging, source.facts, context, tokens, hf_folder)
        pieces = _pieces(staging, evaluation or calibration)
        judge = Judge(model, source.facts, context, pieces)
        exact = _write_exact(judge, source, context, staging, shelf)
        source.write(staging, context, shelf, quantize, calibration)
        steps = [judge.keras, exact]
        if quantize is not None:
            steps.append(judge.step(staging, quantize, None))
        steps[-1] = _timed(judge, staging, steps[-1])
        shelf.answer(staging, judge.prompts[-1], SAME_KERNELS)
        notes = [*judge.notes, *shelf.notes(staging, pieces), *notes]
        notes += source.notes
        report = ExportReport(
            model=model.name,
            steps=tuple(steps),
            latency="One more token after a prompt of 32, on 1 thread.",
            warning=judge.warning,
            notes=tuple(notes),
        )
        _write_rest(staging, report, quantize, tokens, context, shelf)
    return report


def _pieces(folder: Path, texts: Sequence[str] | None) -> list[list[int]]:
    """Texts as ids, as the folder's tokenizer makes them."""
    path = folder / "tokenizer.json"
    if texts is None:
        return []
    if not path.exists():
        raise ValueError(
            "`evaluation` and `calibration` are texts, which need the "
            "tokenizer that trained. Pass it as `tokenizer`. Received: a model "
            "without preprocessor"
        )
    import tokenizers

    encode = tokenizers.Tokenizer.from_file(str(path)).encode
    pieces: list[list[int]] = []
    room = compare.MOST
    for text in texts:
        ids = encode(text).ids[:room]
        cuts = range(0, len(ids), compare.PIECE)
        pieces += [ids[n : n + compare.PIECE] for n in cuts]
        room -= len(ids)
    pieces = [piece for piece in pieces if len(piece) > 1]
    if not pieces:
        raise ValueError(
            "`evaluation` and `calibration` are texts of more than a token "
            f"each. Received: {len(texts)} texts with nothing to predict"
        )
    return pieces


def _write_config(
    folder: Path,
    facts: Facts,
    context_length: int,
    tokens: TokenizerFiles | None,
    hf_folder: str | Path | None,
) -> None:
    known: dict[str, Any] = {}
    if tokens is not None:
        known = {
            "end": tokens.end_ids,
            "pad": tokens.pad_id,
            "start": tokens.start_id,
        }
    settings = genai_config(facts, context_length, **known)
    settings["search"] |= generation_settings(hf_folder)
    write_json(folder / NAME, settings)


def _write_exact(
    judge: Judge,
    source: Source,
    context_length: int,
    folder: Path,
    shelf: Shelf,
) -> Step:
    """Compares the float32 graph, which must compute what Keras computes."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        source.write(Path(name), context_length, shelf)
        shelf.check(Path(name), judge.prompts, judge.bound)
        return judge.step(Path(name), "float32", judge.bound)


def _timed(judge: Judge, folder: Path, step: Step) -> Step:
    """The last step with its latency, run by onnxruntime-genai besides."""
    prompt = judge.prompts[-1]
    compare.check_answer(folder, Session(folder), prompt, SAME_KERNELS)
    latency = Session(folder, threads=1).milliseconds()
    return dataclasses.replace(step, latency_ms=latency)


def _write_rest(
    folder: Path,
    report: ExportReport,
    quantize: str | None,
    tokens: TokenizerFiles | None,
    context_length: int,
    shelf: Shelf,
) -> None:
    report.write(folder)
    files = {
        file.name: file.stat().st_size for file in sorted(folder.iterdir())
    }
    files |= {MANIFEST: 0}
    text = readme(report, files, tokens, context_length, shelf.entries)
    (folder / "README.md").write_text(text, "utf-8")
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    manifest = {
        "format": FORMAT,
        "model": report.model,
        "quantization": quantize,
        "min_onnxruntime_genai": "0.18",
        "context_length": context_length,
        "adapters": shelf.entries,
        "versions": {"keras_peft": keras_peft.__version__, **versions},
        "files": file_entries(folder),
    }
    if tokens is not None:
        manifest["add_bos"] = tokens.add_bos
        manifest["normalization"] = tokens.normalization
    write_json(folder / MANIFEST, manifest)


def verify(
    folder: Path, manifest: Mapping[str, Any], model: keras.Model, texts: Any
) -> ExportReport:
    """See `keras_peft.export.verify`; the files are those of the manifest."""
    facts = sources.read(model).facts
    context = manifest["context_length"]
    judge = Judge(model, facts, context, _pieces(folder, texts))
    name = manifest["quantization"] or "float32"
    check = judge.check(folder, name, None)
    recorded = json.loads((folder / "report.json").read_text("utf-8"))
    rounding = compare.bound(model, facts) or 0.0
    compare_with_export(check, recorded["steps"][-1], rounding)
    steps = [judge.keras, judge.step(folder, name, None)]
    steps[-1] = _timed(judge, folder, steps[-1])
    return ExportReport(
        model=model.name, steps=tuple(steps), notes=tuple(judge.notes)
    )
