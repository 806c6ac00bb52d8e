"""A decoder's graph from a trace of keras-hub's own cache.

For models that no family describes: any that keeps keys and values as
keras-hub does.
"""

import functools
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import keras
import numpy as np
import onnx_ir as ir
import onnx_ir.tape

from keras_peft.export import graph as tracing
from keras_peft.export import names
from keras_peft.export.genai import cached
from keras_peft.export.genai import checks
from keras_peft.export.genai import compact
from keras_peft.export.genai import graph
from keras_peft.export.genai.plan import BITS
from keras_peft.export.genai.shelf import Shelf
from keras_peft.export.optimize import optimize
from keras_peft.export.single_precision import in_float32
from keras_peft.quantize_aware import integers

if TYPE_CHECKING:
    import onnx

# What a runtime reports if it is given padding.
GUARD = "texts_of_a_batch_must_have_equally_many_tokens_without_padding"
NOTE = (
    "No description exists for this architecture: the graph was traced from "
    "keras-hub's own cache, which knows no padding. All texts of a batch must "
    "have equally many tokens; given padding, the graph raises an error."
)
_SAMPLE = {"batch": 2, "tokens": 3, "past": 5}


class Traced:
    """A graph of what keras-hub computes with its cache; see `Source`."""

    def __init__(self, model: keras.Model):
        self.signature, self.facts = cached.read(model)
        checks.check_finite(
            (v.path, keras.ops.convert_to_numpy(v)) for v in model.variables
        )
        self.notes = [NOTE]
        self._model = model

    def check(
        self,
        quantize: str | None,
        calibration: Sequence[str] | None,
        adapters: Mapping[str, Any] | None,
    ) -> None:
        """Raises for what only a graph made of a description can do."""
        problems = []
        if adapters:
            problems.append(
                "Adapters at run time need a description of the architecture, "
                "and this one is traced. Merge one adapter and export it "
                f"alone. Received: adapters={sorted(adapters)}"
            )
        if calibration is not None and quantize in BITS:
            problems.append(
                "`calibration` chooses integers by what a description says of "
                "the layers, and this architecture has none. Pass the texts "
                "as `evaluation`, which measures what rounding costs. "
                f"Received: calibration with quantize={quantize!r}"
            )
        if problems:
            raise ValueError("\n".join(problems))

    def write(
        self,
        folder: Path,
        context_length: int,
        shelf: Shelf,
        quantize: str | None = None,
        calibration: Sequence[str] | None = None,
    ) -> None:
        """See `Source`."""
        model = ir.from_proto(self._graph)
        if quantize is not None:
            trained = integers(self._model) if quantize in BITS else {}
            compact.store(model, quantize, trained.values())
        _name_shapes(model)
        _guard(model)
        graph.save(model, folder)

    @functools.cached_property
    def _graph(self) -> "onnx.ModelProto":
        """The float32 graph of the first tracer that manages."""
        model, notes = in_float32(self._model)
        self.notes += notes
        failures = []
        for tracer in tracing.tracers_for(model):
            try:
                return _traced(model, self.signature, tracer)
            except tracing.TracingError as error:
                failures.append(f"The {tracer} tracer failed: {error}")
        raise tracing.TracingError(
            "No tracer turned the model's cache into a graph; nothing was "
            "written. `keras_peft.export.to_onnx` exports it without a cache. "
            "Tracers come with `pip install keras-peft[export]`. Received:\n"
            + "\n".join(failures)
        )


def _traced(
    model: keras.Model, signature: cached.CachedSignature, tracer: str
) -> "onnx.ModelProto":
    traced = tracing.trace(model, signature, _sample(signature), tracer)
    made = ir.from_proto(traced)
    names.name_interface(made, signature, cached.output_names(signature))
    variables = {v.path: keras.ops.convert_to_numpy(v) for v in model.variables}
    optimize(made, variables)
    return ir.to_proto(made)


def _sample(signature: cached.CachedSignature) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        i.name: (
            rng.normal(size=i.sized(_SAMPLE))
            if i.dtype == "float32"
            else np.ones(i.sized(_SAMPLE))
        ).astype(i.dtype)
        for i in signature.inputs
    }


def _name_shapes(model: ir.Model) -> None:
    """Names the length of keys and values with those of the new tokens."""
    for value in model.graph.outputs:
        if value.name != cached.LOGITS:
            _, heads, _, size = value.shape
            value.shape = ir.Shape(["batch", heads, "total", size])


def _guard(model: ir.Model) -> None:
    """Lets no padding through: ids are reshaped to what they are, or fail.

    The sizes of a reshape are looked at by a runtime on whatever device.
    """
    ids, *pasts = model.graph.inputs
    users = list(ids.uses())
    nodes = ir.tape.Tape()
    shape = ir.Shape(["batch", "total"])
    mask = ir.Value(name=cached.MASK, shape=shape, type=ids.type)
    least = nodes.op("ReduceMin", [mask], {"keepdims": 0})
    padded = nodes.op("Equal", [least, nodes.op("Sub", [least, least])])
    padded = nodes.op("Cast", [padded], {"to": ir.DataType.INT64})
    sizes = nodes.op("Add", [nodes.op("Shape", [ids]), padded])
    checked = nodes.op("Reshape", [ids, sizes], name=GUARD)
    for node, position in users:
        node.replace_input_with(position, checked)
    model.graph.insert_before(model.graph[0], nodes.nodes)
    model.graph.inputs[:] = [ids, mask, *pasts]
