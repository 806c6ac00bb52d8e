"""What speaks against an export, found before any work is done."""

import importlib.util
import json
import math
import shutil
from collections.abc import Iterable
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_peft import layer_tree
from keras_peft.export.adapters import adapter_problems
from keras_peft.export.folder import check_target
from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.decoder import Linear
from keras_peft.export.genai.decoder import Norm
from keras_peft.export.genai.decoder import Table
from keras_peft.export.genai.decoder import parts
from keras_peft.export.genai.facts import Facts
from keras_peft.export.report import megabytes

QUANTIZE = (None, "float16", "int8", "int4")
# How many tokens where neither the user nor the model says.
USUAL_CONTEXT = 2048


def check_packages() -> None:
    """Raises an `ImportError` if a package is not installed."""
    missing = [
        name
        for name in ("onnx_ir", "onnxruntime", "onnxruntime_genai")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ImportError(
            "Language models on a device need packages that are not "
            "installed; get them with `pip install keras-peft[genai]`. "
            f"Received: no {missing}"
        )


def check_arguments(
    model: keras.Model, folder: str | Path, quantize: str | None
) -> None:
    """Raises for what can be seen without reading weights."""
    check_packages()
    problems = [*_carried(model), *check_target(folder)]
    if quantize not in QUANTIZE:
        problems.append(
            "`quantize` names the numbers that the folder stores: None for "
            "float32, 'float16', 'int8' or 'int4'. "
            f"Received: quantize={quantize!r}"
        )
    quantized = [
        path
        for path, layer in layer_tree.walk(model)
        if getattr(layer, "quantization_mode", None)
    ]
    if quantized:
        problems.append(
            "Keras quantized this model; its integers would be rounded a "
            "second time. Export the float model with `quantize`. "
            f"Received: quantized layers {quantized[:5]}"
        )
    if problems:
        raise ValueError("\n".join(problems))


def _carried(model: keras.Model) -> list[str]:
    problems = adapter_problems(model)
    adapted = [path for path, _ in layer_tree.adapted_layers(model)]
    if problems or not adapted:
        return problems
    return [
        "The model carries adapters that are no change of weights: the graph "
        "of a decoder has no place for them. Drop them with "
        "`keras_peft.remove(model)`, or export the model as it is with "
        f"`keras_peft.export.to_onnx`. Received: adapted layers {adapted[:5]}"
    ]


def check_weights(decoder: Decoder) -> None:
    """The same of all weights of a decoder: no file could be right."""
    found = []
    for part in parts(decoder, Linear):
        found += [(part.key, part.kernel), (part.key, part.bias)]
    for norm in parts(decoder, Norm):
        found += [(norm.path, norm.scale), (norm.path, norm.bias)]
    found += [(table.key, table.rows) for table in parts(decoder, Table)]
    check_finite((key, array) for key, array in found if array is not None)


def check_finite(weights: Iterable[tuple[str, np.ndarray]]) -> None:
    """Raises for weights, by their names, that are no numbers."""
    wrong = [key for key, array in weights if not np.isfinite(array).all()]
    if wrong:
        raise ValueError(
            "Weights are infinite or not a number, so the model computes "
            "nothing. Train again with a lower learning rate or gradient "
            "clipping, or go back to a checkpoint. "
            f"Received: {len(wrong)} such weights: {wrong[:5]}"
        )


def choose_context(
    facts: Facts, asked: int | None, hf_folder: str | Path | None
) -> tuple[int, list[str]]:
    """How many tokens the folder serves, and what to say of the choice."""
    known = facts.context_length or _published(hf_folder)
    if asked is None:
        if known is not None:
            return known, []
        return USUAL_CONTEXT, [
            "Neither the Keras model nor a Hugging Face folder tells how many "
            f"tokens this model was made for: the folder serves {USUAL_CONTEXT}"
            ". Choose with `context_length`, or pass `hf_folder`."
        ]
    whole = isinstance(asked, int) and not isinstance(asked, bool)
    if not whole or asked < 2 or (known is not None and asked > known):
        most = "" if known is None else f", at most {known}"
        raise ValueError(
            "`context_length` is how many tokens a prompt and its answer may "
            f"have{most}: beyond what it was trained on, a model writes "
            f"nonsense. Received: context_length={asked!r}"
        )
    return asked, []


def _published(hf_folder: str | Path | None) -> int | None:
    if hf_folder is None:
        return None
    path = Path(hf_folder) / "config.json"
    if not path.is_file():
        raise ValueError(
            "`hf_folder` is the folder that the model came from, with its "
            f"`config.json`. Received: hf_folder={str(hf_folder)!r}"
        )
    settings: Mapping[str, Any] = json.loads(path.read_text("utf-8"))
    settings = settings.get("text_config", settings)
    length: int | None = settings.get("max_position_embeddings")
    return length


def check_room(folder: str | Path, model: keras.Model) -> None:
    """Raises if the disk has no room for the model, twice in float32."""
    needed = 2 * sum(4 * math.prod(v.shape) for v in model.variables)
    place = Path(folder).absolute().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(
            "The disk has no room for the export, which writes the model in "
            "float32 once to compare it with Keras. Make room, or choose "
            f"another place. Received: {megabytes(free)} free of "
            f"{megabytes(needed)} needed at {str(place)!r}"
        )
