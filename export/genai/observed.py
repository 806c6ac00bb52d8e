"""The float32 graph at work: what its layers read, and what each is worth."""

import json
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from keras_peft.export.genai import graph
from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.runtime import Session
from keras_peft.export.genai.slots import LAYERS
from keras_peft.export.genai.slots import Slots


class Observed(Session):
    """A decoder in float32, of which the inputs of all layers can be read.

    Its kernels can be replaced for one run: they are inputs of the graph with
    a default.

    Attributes:
        keys: `{name of a kernel: keys of the layers whose kernels it joins}`.
        inputs: `{name of a kernel: name of what it multiplies}`.

    Args:
        decoder: What to compute.
        context_length: As in `graph.build`.
        folder: An empty folder for the graph's files.
    """

    def __init__(self, decoder: Decoder, context_length: int, folder: Path):
        # Places for adapters name the layers that each operator joins.
        slots = Slots(low_rank=True)
        model = graph.build(decoder, {}, slots, context_length)
        adaptable = json.loads(model.metadata_props[LAYERS])
        self.keys: dict[str, list[str]] = {}
        self.inputs: dict[str, str] = {}
        for node in model.graph:
            kernel = node.inputs[1] if node.op_type == "MatMul" else None
            name = str(kernel.name) if kernel is not None else ""
            layers = adaptable.get(name.removesuffix(".kernel"))
            if layers and name.endswith(".kernel"):
                self.keys[name] = layers
                self.inputs[name] = _as_output(model, node.inputs[0])
                model.graph.inputs.append(kernel)
        graph.save(model, folder)
        super().__init__(folder)

    def grams(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """`{name of an input: mean of x x^T}` over rows of token ids."""
        names = sorted(set(self.inputs.values()))
        sums: dict[str, Any] = dict.fromkeys(names, 0.0)
        for row in rows:
            for name, x in zip(names, self._run(names, row), strict=True):
                x = x.reshape(-1, x.shape[-1])
                sums[name] = sums[name] + x.T @ x
        return {name: total / rows.size for name, total in sums.items()}

    def log_probabilities(
        self,
        row: Sequence[int],
        kernels: Mapping[str, np.ndarray] | None = None,
    ) -> np.ndarray:
        """`[tokens, vocabulary]`, with other kernels by their names."""
        (logits,) = self._run(["logits"], row, kernels or {})
        top = logits.max(axis=-1, keepdims=True)
        logits -= top
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    def _run(
        self,
        names: Sequence[str],
        row: Sequence[int],
        kernels: Mapping[str, np.ndarray] | None = None,
    ) -> list[np.ndarray]:
        caches = [value.name for value in self._caches]
        feed = dict(zip(caches, self.empty(), strict=True))
        feed["input_ids"] = np.array([row], "int64")
        feed["attention_mask"] = np.ones((1, len(row)), "int64")
        feed |= kernels or {}
        found = self._session.run(list(names), feed)
        return [array[0] for array in found]


def _as_output(model: ir.Model, value: ir.Value) -> str:
    if value not in model.graph.outputs:
        value.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs.append(value)
    return str(value.name)
