"""Keras model on the torch backend -> ONNX, with torch's dynamo exporter."""

import contextlib
from collections.abc import Collection
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import keras
import numpy as np

from keras_peft.export import patches
from keras_peft.export.signature import Signature


def trace(
    model: keras.Model,
    signature: Signature,
    sample: dict[str, np.ndarray],
    path: Path,
    but: Collection[ModuleType] = (),
) -> None:
    """Writes the graph of `model`, traced on `sample`, to `path`.

    `but` names patches that stay away.
    """
    import torch

    class Flat(torch.nn.Module):
        """The model as a function of flat tensors, as ONNX has it."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: Any) -> tuple[Any, ...]:
            named = dict(zip(names, tensors, strict=True))
            outputs = signature.call(self.model, named)
            return tuple(keras.tree.flatten(outputs))

    names = [i.name for i in signature.inputs]
    # `Dim.AUTO` would quietly fix an axis the trace does not understand.
    axes = tuple(
        {
            axis: torch.export.Dim.DYNAMIC
            for axis, size in enumerate(i.shape)
            if isinstance(size, str)
        }
        for i in signature.inputs
    )
    device = keras.src.backend.torch.core.get_device()
    tensors = tuple(torch.tensor(sample[n], device=device) for n in names)
    with _frozen(model), patches.applied("torch", but), torch.no_grad():
        program = torch.onnx.export(
            Flat(),
            tensors,
            dynamo=True,
            dynamic_shapes=(axes,),
            input_names=[f"input_{n}" for n in range(len(names))],
            verbose=False,
        )
    program.optimize()
    program.save(str(path), external_data=True)


@contextlib.contextmanager
def _frozen(model: keras.Model) -> Iterator[None]:
    """Variables as constants: the tracer refuses tensors with gradients."""
    import torch

    tensors = [
        v.value
        for v in model.variables
        if isinstance(v.value, torch.Tensor) and v.value.requires_grad
    ]
    for tensor in tensors:
        tensor.requires_grad_(False)
    try:
        yield
    finally:
        for tensor in tensors:
            tensor.requires_grad_(True)
