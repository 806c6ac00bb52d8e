"""The README of an exported folder, with code that runs exactly this model."""

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from keras_peft.export.litert import generation
from keras_peft.export.preprocessor import Preprocessing
from keras_peft.export.report import ExportReport
from keras_peft.export.report import megabytes
from keras_peft.export.result import Result
from keras_peft.export.result import TensorSpec
from keras_peft.export.text import SENTENCE_PIECE_FILE

TEXT = "The first text to try."
# Stands for the size of a free axis where nothing says which to take.
FREE_AXES = {"batch": 1}
DEFAULT_FREE_AXIS = 16

FILES = {
    "model.onnx": "the model",
    "model.onnx.data": "its weights",
    "model.tflite": "the model",
    "tokenizer.json": "text to ids, as in training (Hugging Face `tokenizers`)",
    SENTENCE_PIECE_FILE: "text to ids, as in training (SentencePiece)",
    "preprocessor.json": "which input gets what, and how it is prepared",
    "labels.json": "names of the classes",
    "manifest.json": "sizes, hashes, versions, inputs and outputs",
    "report.html": "size, speed and quality, to read",
    "report.json": "the same, for programs",
}


@dataclasses.dataclass(frozen=True)
class Client:
    """How a runtime is written in Python.

    Attributes:
        package: What `pip` calls it.
        imported: The line that imports it.
        load: The line that reads the file.
        run: The line that turns `inputs` into `outputs`.
        listed: The lines that show what comes out.
        first: The first row of the first output.
    """

    package: str
    imported: str
    load: str
    run: str
    listed: tuple[str, ...]
    first: str


CLIENTS = {
    "ONNX": Client(
        package="onnxruntime",
        imported="import onnxruntime",
        load='session = onnxruntime.InferenceSession("model.onnx")',
        run="outputs = session.run(None, inputs)",
        listed=(
            "for spec, output in zip(session.get_outputs(), outputs):",
            "    print(spec.name, output.shape)",
        ),
        first="outputs[0][0]",
    ),
    "LiteRT": Client(
        package="ai-edge-litert",
        imported="from ai_edge_litert.interpreter import Interpreter",
        load='run = Interpreter("model.tflite").get_signature_runner()',
        run="outputs = run(**inputs)",
        listed=(
            "for name, output in outputs.items():",
            "    print(name, output.shape)",
        ),
        first='outputs["{output}"][0]',
    ),
}


def readme(
    report: ExportReport,
    files: Sequence[str],
    result: Result,
    preprocessing: Preprocessing,
    labels: Sequence[str] | None,
) -> str:
    """What the folder is, how to run it, and what each file is for."""
    table = "\n".join(
        f"| `{name}` | {FILES[name]} |" for name in FILES if name in files
    )
    client = CLIENTS[report.format]
    packages = " ".join([client.package, "numpy", *_packages(preprocessing)])
    return f"""# {report.model}

{_summary(report)}

## Run it

`pip install {packages}`, then in this folder:

```python
{code(result.inputs, preprocessing, labels, client, result.outputs)}
```

## Files

| file | content |
|---|---|
{table}
"""


def _summary(report: ExportReport) -> str:
    final = report.final
    size = megabytes(final.num_bytes)
    parts = [f"A model for {report.format} of {size} ({final.name})"]
    if final.latency_ms is not None:
        parts.append(f"{final.latency_ms:.1f} ms per sample")
    if final.accuracy is not None:
        parts.append(f"{final.accuracy:.1%} of labeled samples right")
    return ", ".join(parts) + ". `report.html` has the details."


def _packages(preprocessing: Preprocessing) -> list[str]:
    if preprocessing.text is None:
        return []
    exact = preprocessing.text.tokenizer is not None
    return ["tokenizers" if exact else "sentencepiece"]


def code(
    inputs: Sequence[TensorSpec],
    preprocessing: Preprocessing,
    labels: Sequence[str] | None = None,
    client: Client = CLIENTS["ONNX"],
    outputs: Sequence[TensorSpec] = (),
) -> str:
    """A Python script that runs the model once, without Keras."""
    own = [f"import {package}" for package in _packages(preprocessing)]
    lines = ["import json", ""] if labels else []
    lines += sorted(
        ["import numpy as np", client.imported, *own],
        key=lambda line: (line.startswith("from"), line),
    )
    if generation.writes_text(inputs):
        prepare = _prepare(inputs[:1], preprocessing)
        decode = "import tokenizers" in own
        return "\n".join(
            [*lines, "", *generation.code(inputs, prepare, decode)]
        )
    first = client.first.format(output=outputs[0].name if outputs else "")
    lines += ["", client.load, *_prepare(inputs, preprocessing), client.run]
    return "\n".join([*lines, *(_show(first) if labels else client.listed)])


def _prepare(
    inputs: Sequence[TensorSpec], preprocessing: Preprocessing
) -> list[str]:
    if preprocessing.image is not None:
        return _prepare_image(inputs[0], preprocessing.image)
    if preprocessing.text is None:
        lines = [f'    "{spec.name}": {_ones(spec)},' for spec in inputs]
        return ["inputs = {", *lines, "}"]
    settings = preprocessing.text.settings
    exact = preprocessing.text.tokenizer is not None
    rows = _with_tokenizer() if exact else _with_sentence_piece(settings)
    return [*rows, "inputs = {", *_text_inputs(inputs, settings), "}"]


def _with_tokenizer() -> list[str]:
    return [
        'tokenizer = tokenizers.Tokenizer.from_file("tokenizer.json")',
        f'lines = tokenizer.encode_batch(["{TEXT}"])',
        "ids = np.array([line.ids for line in lines])",
        "type_ids = np.array([line.type_ids for line in lines])",
        "attention_mask = np.array([line.attention_mask for line in lines])",
    ]


def _with_sentence_piece(settings: Mapping[str, Any]) -> list[str]:
    """One text, so that nothing has to be padded unless lengths are fixed."""
    start, end = settings["start_ids"], settings["end_ids"]
    unknown, offset = settings["unknown_in"], settings["id_offset"]
    lines = [
        "tokenizer = sentencepiece.SentencePieceProcessor("
        f'model_file="{SENTENCE_PIECE_FILE}")',
        f'pieces = tokenizer.encode("{TEXT}")',
        f"pieces = [{settings['unknown_id']} if i == {unknown} else "
        f"i + {offset} for i in pieces]",
    ]
    length = settings["max_length"]
    if length:
        lines.append(f"pieces = pieces[: {length - len(start) - len(end)}]")
    lines.append(f"pieces = {start} + pieces + {end}")
    if settings["padding"]["to"] == "max_length":
        padding = f"[{settings['padding']['id']}] * ({length} - len(pieces))"
        left = settings["padding"]["side"] == "left"
        both = f"{padding} + pieces" if left else f"pieces + {padding}"
        lines.append(f"pieces = {both}")
    return lines + [
        "ids = np.array([pieces])",
        "type_ids = np.zeros_like(ids)",
        f"attention_mask = ids != {settings['padding']['id']}",
    ]


def _text_inputs(
    inputs: Sequence[TensorSpec], settings: Mapping[str, Any]
) -> list[str]:
    padding = settings["padding"]["id"]
    lines = []
    for spec in inputs:
        field = settings["inputs"][spec.name]
        if "!=" in field:
            field = f"(ids != {padding})"
        lines.append(f'    "{spec.name}": {field}.astype("{spec.dtype}"),')
    return lines


def _prepare_image(spec: TensorSpec, settings: Mapping[str, Any]) -> list[str]:
    """Pixels of an image that was resized before; here a gray one."""
    scale, offset = settings["scale"], settings["offset"]
    sizes = dict(zip(("height", "width"), settings["size"], strict=False))
    shape = _shape(spec, sizes)
    axis = -1 if settings["data_format"] == "channels_last" else 1
    lines = [f"pixels = np.full({shape}, 128.0)  # 0 to 255, resized"]
    for name, numbers in (("scale", scale), ("offset", offset)):
        lines.append(f"{name} = np.array({numbers})")
        if axis == 1 and isinstance(numbers, list):
            lines.append(f"{name} = {name}[:, None, None]")
    return lines + [
        f'inputs = {{"{spec.name}": (pixels * scale + offset)'
        f'.astype("{spec.dtype}")}}',
    ]


def _ones(spec: TensorSpec) -> str:
    return f'np.ones({_shape(spec, {})}, "{spec.dtype}")'


def _shape(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    known = FREE_AXES | dict(sizes)
    shape = []
    for size in spec.shape:
        named = [n for axis, n in known.items() if str(size).endswith(axis)]
        free = named[0] if named else DEFAULT_FREE_AXIS
        shape.append(size if isinstance(size, int) else free)
    return tuple(shape)


def _show(first: str) -> list[str]:
    return [
        'with open("labels.json", encoding="utf-8") as file:',
        "    labels = json.load(file)",
        f"print(labels[{first}.argmax()], {first})",
    ]
