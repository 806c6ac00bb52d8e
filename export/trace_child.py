"""The process a graph is traced in, with a Keras backend of its own.

Run as `python -m keras_peft.export.trace_child` by `worker.py`. A line of its
input names a folder with a model and a request; a line of its output says that
the graph is there, or `error.txt`.
"""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import numpy as np

if TYPE_CHECKING:
    import keras

    from keras_peft.export.signature import Signature


def main() -> None:
    """Traces in one folder after the other, as their names come in."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print is no reply.
    for line in sys.stdin:
        folder = Path(line.removesuffix("\n"))
        try:
            trace(folder)
        except Exception:
            text = traceback.format_exc()
            (folder / "error.txt").write_text(text, encoding="utf-8")
        print("done", file=replies, flush=True)


def trace(folder: Path) -> None:
    """Traces the model in `folder` as its request says."""
    request = json.loads((folder / "request.json").read_text())
    for module in request["modules"]:
        importlib.import_module(module)
    import keras

    from keras_peft.export import patches

    # The file was written by the process that waits for this one.
    with patches.applied("load"):
        model = keras.saving.load_model(
            folder / "model.keras", compile=False, safe_mode=False
        )
    signature = _signature(request)
    with np.load(folder / "sample.npz") as sample:
        path = folder / request["file"]
        trace_here(model, signature, dict(sample), path, request["source"])
    del model
    keras.backend.clear_session()


def _signature(request: dict[str, Any]) -> "Signature":
    from keras_peft.export.signature import ModelInput
    from keras_peft.export.signature import Signature

    inputs = tuple(
        ModelInput(i["name"], i["dtype"], tuple(i["shape"]))
        for i in request["inputs"]
    )
    if "length_axis" in request:
        from keras_peft.export.genai.cached import CachedSignature

        return CachedSignature(
            inputs, request["structure"], length_axis=request["length_axis"]
        )
    return Signature(inputs, request["structure"], request["by_keyword"])


def trace_here(
    model: "keras.Model",
    signature: "Signature",
    sample: dict[str, np.ndarray],
    path: Path,
    source: str,
) -> None:
    """Traces with whatever backend this process has.

    The ending of `path` says which format it gets, and `source` is the backend
    that the model comes from.
    """
    import keras

    if path.suffix == ".tflite":
        from keras_peft.export.litert import trace as trace_litert

        trace_litert.trace(model, signature, path, source=source)
    elif keras.config.backend() == "torch":
        from keras_peft.export import trace_torch

        trace_torch.trace(model, signature, sample, path)
    else:
        from keras_peft.export import trace_tensorflow

        trace_tensorflow.trace(model, signature, path, source=source)


if __name__ == "__main__":
    main()
