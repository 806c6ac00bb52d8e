"""The process a graph is traced in, with a Keras backend of its own.

Run as `python -m keras_peft.export.trace_child FOLDER` by `graph.py`, which
wrote the model and the request into the folder and waits for `graph.onnx`.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import keras

    from keras_peft.export.signature import Signature


def main(folder: Path) -> None:
    """Traces the model in `folder` as its request says."""
    request = json.loads((folder / "request.json").read_text())
    for module in request["modules"]:
        importlib.import_module(module)
    import keras

    from keras_peft.export.signature import ModelInput
    from keras_peft.export.signature import Signature

    # The file was written by the process that waits for this one.
    model = keras.saving.load_model(
        folder / "model.keras", compile=False, safe_mode=False
    )
    signature = Signature(
        tuple(
            ModelInput(i["name"], i["dtype"], tuple(i["shape"]))
            for i in request["inputs"]
        ),
        request["structure"],
        request["by_keyword"],
    )
    with np.load(folder / "sample.npz") as sample:
        trace_here(model, signature, dict(sample), folder / "graph.onnx")


def trace_here(
    model: "keras.Model",
    signature: "Signature",
    sample: dict[str, np.ndarray],
    path: Path,
) -> None:
    """Traces with whatever backend this process has."""
    import keras

    if keras.config.backend() == "torch":
        from keras_peft.export import trace_torch

        trace_torch.trace(model, signature, sample, path)
    else:
        from keras_peft.export import trace_tensorflow

        trace_tensorflow.trace(model, signature, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
