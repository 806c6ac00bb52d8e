"""From a keras-hub CausalLM to a folder that onnxruntime-genai runs."""

import dataclasses
import importlib.metadata
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_peft
from keras_peft.export.checks import enforce
from keras_peft.export.folder import FORMAT
from keras_peft.export.folder import MANIFEST
from keras_peft.export.folder import file_entries
from keras_peft.export.folder import write_json
from keras_peft.export.genai import checks
from keras_peft.export.genai import compare
from keras_peft.export.genai import families
from keras_peft.export.genai import graph
from keras_peft.export.genai.config import NAME
from keras_peft.export.genai.config import genai_config
from keras_peft.export.genai.config import generation_settings
from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.plan import plan_storage
from keras_peft.export.genai.readme import readme
from keras_peft.export.genai.runtime import Session
from keras_peft.export.genai.tokenizer import TokenizerFiles
from keras_peft.export.genai.tokenizer import write_tokenizer
from keras_peft.export.report import ExportReport
from keras_peft.export.report import Step
from keras_peft.export.result import Verification
from keras_peft.files import whole_folder

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
) -> ExportReport:
    """See `keras_peft.export.to_genai`."""
    checks.check_arguments(model, folder, quantize)
    decoder = families.describe(model)
    checks.check_weights(decoder)
    context, notes = checks.choose_context(decoder, context_length, hf_folder)
    num_bytes = sum(4 * int(np.prod(v.shape)) for v in model.variables)
    checks.check_room(folder, 2 * num_bytes)
    trained = tokenizer or getattr(model, "preprocessor", None)
    with whole_folder(folder) as staging:
        tokens = None
        if trained is None:
            notes.append(
                "The folder has no tokenizer, since the model has no "
                "preprocessor and `tokenizer` was not given: it takes ids."
            )
        else:
            tokens = write_tokenizer(
                trained, staging, hf_folder, evaluation or ()
            )
        _write_config(staging, decoder, context, tokens, hf_folder)
        judge = _Judge(model, decoder, context, _pieces(staging, evaluation))
        exact = _write_exact(judge, decoder, context, staging)
        plan = plan_storage(decoder, quantize)
        graph.save(graph.build(decoder, plan, context_length=context), staging)
        steps = [Step("keras", num_bytes, loss=judge.loss), exact]
        if quantize is not None:
            steps.append(judge.step(staging, quantize, None))
        steps[-1] = _timed(judge, staging, steps[-1])
        report = ExportReport(
            model=model.name,
            steps=tuple(steps),
            latency="One more token after a prompt of 32, on 1 thread.",
            notes=(*judge.notes, *notes),
        )
        _write_rest(staging, report, quantize, tokens, context)
    return report


class _Judge:
    """The Keras model's word on prompts and texts, to compare others with."""

    def __init__(
        self,
        model: keras.Model,
        decoder: Decoder,
        context_length: int,
        pieces: Sequence[Sequence[int]],
    ):
        self.prompts = compare.prompts(decoder, pieces, context_length)
        self.references = [
            compare.keras_logits(model, ids) for ids in self.prompts
        ]
        self.bound = compare.bound(model, decoder)
        self.pieces = pieces
        self.scores = compare.joined(
            [compare.score(compare.keras_logits(model, p), p) for p in pieces]
        )
        self.notes: list[str] = []

    @property
    def loss(self) -> float | None:
        return None if self.scores is None else self.scores.loss

    def step(self, folder: Path, name: str, tolerance: float | None) -> Step:
        """Measures the graph in a folder; raises beyond `tolerance`."""
        session = Session(folder)
        check: Verification = compare.compare_logits(
            session, self.prompts, self.references, name, tolerance
        )
        enforce(check)
        size = sum(f.stat().st_size for f in folder.glob(graph.FILE + "*"))
        found = Step(
            name,
            size,
            max_abs=check.max_abs,
            relative=check.relative,
            cosine=check.cosine,
        )
        if self.scores is None:
            return found
        scores = compare.joined(
            [compare.score(session.logits(p, len(p)), p) for p in self.pieces]
        )
        if name != "float32":
            self._note(name, scores)
        return dataclasses.replace(found, loss=scores.loss)

    def _note(self, name: str, scores: Any) -> None:
        change, error = compare.difference(self.scores, scores)
        same = float((scores.choices == self.scores.choices).mean())
        self.notes.append(
            f"On {len(scores.losses)} tokens of `evaluation`, {name} changes the "
            f"loss by {change:+.4f} ± {error:.4f}; the most likely next token "
            f"is that of Keras for {same:.1%}."
        )


def _pieces(folder: Path, texts: Sequence[str] | None) -> list[list[int]]:
    """Texts as ids, as the folder's tokenizer makes them."""
    path = folder / "tokenizer.json"
    if texts is None:
        return []
    if not path.exists():
        raise ValueError(
            "`evaluation` is text, which needs the tokenizer that trained. "
            "Pass it as `tokenizer`. Received: a model without preprocessor"
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
    return [piece for piece in pieces if len(piece) > 1]


def _write_config(
    folder: Path,
    decoder: Decoder,
    context_length: int,
    tokens: TokenizerFiles | None,
    hf_folder: str | Path | None,
) -> None:
    known = {}
    if tokens is not None:
        known = {
            "end": tokens.end_ids,
            "pad": tokens.pad_id,
            "start": tokens.start_id,
        }
    settings = genai_config(decoder, context_length, **known)
    settings["search"] |= generation_settings(hf_folder)
    write_json(folder / NAME, settings)


def _write_exact(
    judge: _Judge, decoder: Decoder, context_length: int, folder: Path
) -> Step:
    """Compares the float32 graph, which must compute what Keras computes."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        exact = graph.build(decoder, context_length=context_length)
        graph.save(exact, Path(name))
        return judge.step(Path(name), "float32", judge.bound)


def _timed(judge: _Judge, folder: Path, step: Step) -> Step:
    """The last step with its latency, run by onnxruntime-genai besides."""
    prompt = judge.prompts[-1]
    compare.check_answer(folder, Session(folder), prompt, SAME_KERNELS)
    latency = Session(folder, threads=1).milliseconds()
    return dataclasses.replace(step, latency_ms=latency)


# The same operators on the same processor, with other buffers: float32's
# rounding, or an input of a product that falls on the other side of a half
# when it is made an 8-bit integer.
SAME_KERNELS = 2.0**-7


def _write_rest(
    folder: Path,
    report: ExportReport,
    quantize: str | None,
    tokens: TokenizerFiles | None,
    context_length: int,
) -> None:
    report.write(folder)
    files = {
        file.name: file.stat().st_size for file in sorted(folder.iterdir())
    }
    files |= {MANIFEST: 0}
    text = readme(report, files, tokens, context_length)
    (folder / "README.md").write_text(text, "utf-8")
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    manifest = {
        "format": FORMAT,
        "model": report.model,
        "quantization": quantize,
        "min_onnxruntime_genai": "0.18",
        "context_length": context_length,
        "versions": {"keras_peft": keras_peft.__version__, **versions},
        "files": file_entries(folder),
    }
    if tokens is not None:
        manifest["add_bos"] = tokens.add_bos
        manifest["normalization"] = tokens.normalization
    write_json(folder / MANIFEST, manifest)
