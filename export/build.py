"""From a Keras model to a checked ONNX graph in memory."""

from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

import keras

from keras_peft.export import comparison
from keras_peft.export import graph as tracing
from keras_peft.export.checks import Checks
from keras_peft.export.checks import check_exportable
from keras_peft.export.checks import enforce
from keras_peft.export.checks import prepare_checks
from keras_peft.export.output_names import output_names
from keras_peft.export.result import FloatWeight
from keras_peft.export.result import OnnxResult
from keras_peft.export.result import Verification
from keras_peft.export.single_precision import in_float32

if TYPE_CHECKING:
    import onnx

_PACKAGES = ("onnx", "onnxruntime", "onnx_ir")


def build_onnx(
    model: keras.Model,
    quantize: str | None = None,
    calibration: Any | Sequence[Any] | None = None,
    tolerance: float | None = None,
) -> OnnxResult:
    """Traces, optimizes, quantizes and checks `model`; writes nothing.

    Args:
        model: A built Keras model, on any backend. Adapters on it become
            part of the graph.
        quantize: `None` for float32, `"float16"`, or `"int8"`.
        calibration: Real inputs to check with: one batch or a sequence of
            batches. A batch is an array, or a dictionary of arrays by input
            name. Inputs are made from the model's input specs by default.
        tolerance: Largest accepted difference of the final graph, relative
            to the largest magnitude of each output. By default a float32
            graph must meet a bound derived from rounding, and from how far
            the model magnifies a change of its inputs, and a quantized graph
            is measured and reported only.

    Returns:
        An `OnnxResult`.

    Raises:
        ValueError: If an argument or the model is not exportable.
        ImportError: If a package of the extra `export` is missing.
        TracingError: If no tracer gives a graph that equals the model.
    """
    check_exportable(model, quantize, "export", _PACKAGES)
    model, notes = in_float32(model)
    checks = prepare_checks(model, calibration)
    float_model, tracer, failures, float_check = _float_graph(
        checks, tolerance if quantize is None else None
    )
    final, left_float = _quantized(checks, float_model, quantize)
    steps = [float_check]
    if quantize is not None:
        steps.append(_compare(checks, final, quantize, tolerance))
        enforce(steps[-1])
    inputs, outputs = _interface(float_model)
    return OnnxResult(
        model=final,
        float_model=float_model,
        quantize=quantize,
        inputs=inputs,
        outputs=outputs,
        tracer=tracer,
        notes=(*notes, *failures),
        verification=tuple(steps),
        weights_left_float=left_float,
        sizes={"float32": float_model.ByteSize()}
        | ({quantize: final.ByteSize()} if quantize else {}),
    )


def _float_graph(
    checks: Checks, tolerance: float | None
) -> tuple["onnx.ModelProto", str, list[str], Verification]:
    """The graph of the first tracer whose result equals the model."""
    tracers = tracing.tracers_for(checks.model)
    if not tracers:
        raise ImportError(
            "A graph is traced by torch or by TensorFlow, and neither is "
            "complete here; get one with `pip install keras-peft[export]`. "
            "Received: no onnxscript beside torch, no tf2onnx beside "
            "TensorFlow"
        )
    notes: list[str] = []
    for tracer in tracers:
        try:
            graph = _traced(checks, tracer)
            if tolerance is None:
                bound = comparison.rounding_bound(graph)
                forward = comparison.forward(graph)
                check = checks.compare_exactly(forward, bound)
            else:
                check = _compare(checks, graph, "float32", tolerance)
            enforce(check)
        except Exception as error:
            notes.append(f"The {tracer} tracer failed: {error}")
        else:
            return graph, tracer, notes, check
    raise tracing.TracingError(
        "No tracer gave a graph that equals the model; nothing was written. "
        "Export a part of the model that takes plain tensors, or open the "
        "model's unusual layers to tracing. Received:\n" + "\n".join(notes)
    )


def _traced(checks: Checks, tracer: str) -> "onnx.ModelProto":
    import onnx_ir as ir

    from keras_peft.export import names
    from keras_peft.export.optimize import optimize

    model, signature = checks.model, checks.signature
    proto = tracing.trace(model, signature, checks.sample, tracer)
    graph = ir.from_proto(proto)
    called = signature.call(model, checks.batches[0])
    outputs = output_names(model, called, signature.names)
    names.name_interface(graph, signature, outputs)
    variables = {
        variable.path: keras.ops.convert_to_numpy(variable)
        for variable in model.variables
    }
    optimize(graph, variables)
    return _to_proto(graph)


def _to_proto(graph: Any) -> "onnx.ModelProto":
    """The file form; it repeats the shape of no initializer."""
    import onnx_ir as ir

    proto = ir.to_proto(graph)
    del proto.graph.value_info[:]
    return proto


def _quantized(
    checks: Checks, graph: "onnx.ModelProto", quantize: str | None
) -> tuple["onnx.ModelProto", tuple[FloatWeight, ...]]:
    if quantize is None:
        return graph, ()
    if quantize == "float16":
        from keras_peft.export.half import to_float16

        return to_float16(graph), ()
    import onnx_ir as ir

    from keras_peft.export.quantize import quantize_int8
    from keras_peft.export.smooth import channel_ranges
    from keras_peft.export.smooth import smooth

    ranges = channel_ranges(graph, [checks.typical, *checks.batches])
    model = ir.from_proto(graph)
    smooth(model, ranges)
    left_float = quantize_int8(model)
    return _to_proto(model), left_float


def _compare(
    checks: Checks,
    graph: "onnx.ModelProto",
    step: str,
    tolerance: float | None,
) -> Verification:
    return checks.compare(comparison.forward(graph), step, tolerance)


def _interface(graph: "onnx.ModelProto") -> tuple[Any, Any]:
    import onnx_ir as ir

    from keras_peft.export import names

    model = ir.from_proto(graph)
    return names.specs(model.graph.inputs), names.specs(model.graph.outputs)
