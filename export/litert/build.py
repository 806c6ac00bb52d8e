"""From a Keras model to a checked LiteRT file in memory."""

from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

import keras

from keras_peft.export import graph as tracing
from keras_peft.export.checks import Checks
from keras_peft.export.checks import check_exportable
from keras_peft.export.checks import enforce
from keras_peft.export.checks import prepare_checks
from keras_peft.export.output_names import output_names
from keras_peft.export.result import FloatWeight
from keras_peft.export.result import LiteRtResult
from keras_peft.export.result import TensorSpec
from keras_peft.export.result import Verification
from keras_peft.export.single_precision import in_float32

if TYPE_CHECKING:
    from keras_peft.export.litert.file import LiteRtFile

_PACKAGES = ("ai_edge_litert", "tensorflow")


def build_litert(
    model: keras.Model,
    quantize: str | None = None,
    calibration: Any | Sequence[Any] | None = None,
    tolerance: float | None = None,
) -> LiteRtResult:
    """Converts, quantizes and checks `model`; writes nothing.

    Args:
        model: A built Keras model, on any backend. Adapters on it become
            part of the file.
        quantize: `None` for float32, `"float16"`, or `"int8"`.
        calibration: Real inputs to check with: one batch or a sequence of
            batches. A batch is an array, or a dictionary of arrays by input
            name. Inputs are made from the model's input specs by default.
        tolerance: Largest accepted difference of the final file, relative to
            the largest magnitude of each output. By default a float32 file
            must meet a bound derived from rounding, and from how far the model
            magnifies a change of its inputs, and a quantized file is measured
            and reported only.

    Returns:
        A `LiteRtResult`.

    Raises:
        ValueError: If an argument or the model is not exportable, or the
            file computes something else than the model.
        ImportError: If a package of the extra `litert` is missing.
        TracingError: If the converter does not take the model.
    """
    check_exportable(model, quantize, "litert", _PACKAGES)
    from keras_peft.export.litert.file import LiteRtFile

    model, notes = in_float32(model)
    checks = prepare_checks(model, calibration)
    bound = tolerance if quantize is None else None
    exact, checks, exact_check, more = _float_file(checks, bound)
    steps = [exact_check]
    final = exact
    left_float: tuple[FloatWeight, ...] = ()
    if quantize is not None:
        content, left_float = _quantized(exact.content, quantize)
        final = LiteRtFile(content)
        steps.append(checks.compare(final.runner(), quantize, tolerance))
        enforce(steps[1])
    return LiteRtResult(
        model=final,
        float_model=exact,
        quantize=quantize,
        inputs=exact.decoder_specs("inputs") or _inputs(checks),
        outputs=exact.decoder_specs("outputs")
        or _outputs(checks, exact.output_names()),
        tracer="tensorflow",
        notes=(*notes, *more),
        verification=tuple(steps),
        weights_left_float=left_float,
        sizes={"float32": exact.num_bytes}
        | ({quantize: final.num_bytes} if quantize else {}),
    )


def _float_file(
    checks: Checks, tolerance: float | None
) -> tuple["LiteRtFile", Checks, Verification, list[str]]:
    """The file, what it was checked on and how, and what to know of it.

    A model that writes text gets a cache, unless its own gives other logits
    than the whole model does.
    """
    from keras_peft.export.litert import decoder
    from keras_peft.export.litert.trace import DECODER

    if not decoder.generates(checks.model, checks.signature):
        return *_checked(checks, tolerance, "model"), []
    try:
        return *_checked(checks, tolerance, DECODER), [
            "Figures are those of texts whose tokens are read at once, but "
            "for the last two, which are decoded one by one."
        ]
    except (RuntimeError, ValueError) as error:
        return *_checked(checks, tolerance, "model"), [
            f"The file reads whole texts, without a cache: {error}"
        ]


def _checked(
    checks: Checks, tolerance: float | None, stem: str
) -> tuple["LiteRtFile", Checks, Verification]:
    from keras_peft.export.litert.file import LiteRtFile

    file = LiteRtFile(_converted(checks, stem))
    if file.generates:
        checks = checks.on([file.admitted(b) for b in checks.batches])
    if tolerance is None:
        check = checks.compare_exactly(file.runner(), file.rounding_bound())
    else:
        check = checks.compare(file.runner(), "float32", tolerance)
    enforce(check)
    return file, checks, check


def _converted(checks: Checks, stem: str) -> bytes:
    from keras_peft.export.litert import decoder
    from keras_peft.export.litert import file
    from keras_peft.export.litert import flatbuffer
    from keras_peft.export.litert.trace import DECODER

    model, signature = checks.model, checks.signature
    with tracing.traced(
        model, signature, checks.sample, "tensorflow", f"{stem}.tflite"
    ) as path:
        tree = flatbuffer.read(path.read_bytes())
    if stem == DECODER:
        inputs, outputs = decoder.names(len(tree.signatureDefs[0].inputs) - 2)
    else:
        inputs = [i.name for i in signature.inputs]
        called = signature.call(model, checks.batches[0])
        outputs = output_names(model, called, signature.names)
    file.name_interface(tree, inputs, outputs)
    file.name_weights(
        tree, {v.path: keras.ops.convert_to_numpy(v) for v in model.variables}
    )
    return flatbuffer.write(tree)


def _quantized(
    content: bytes, quantize: str
) -> tuple[bytes, tuple[FloatWeight, ...]]:
    from keras_peft.export.litert import flatbuffer
    from keras_peft.export.litert import quantize as quantizers

    tree = flatbuffer.read(content)
    left_float: tuple[FloatWeight, ...] = ()
    if quantize == "int8":
        left_float = quantizers.quantize_int8(tree)
    else:
        quantizers.quantize_float16(tree)
    return flatbuffer.write(tree), left_float


def _inputs(checks: Checks) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(i.name, i.dtype, i.shape) for i in checks.signature.inputs
    )


def _outputs(checks: Checks, names: Sequence[str]) -> tuple[TensorSpec, ...]:
    """The outputs, each axis called like the input's that it goes with."""
    outputs = zip(names, *checks.references, strict=True)
    return tuple(
        TensorSpec(
            name,
            arrays[0].dtype.name,
            tuple(
                _axis(checks, number, sizes)
                for number, sizes in enumerate(
                    zip(*(array.shape for array in arrays), strict=True)
                )
            ),
        )
        for name, *arrays in outputs
    )


def _axis(checks: Checks, number: int, sizes: tuple[int, ...]) -> int | str:
    """The size of an axis, or the name of the input axis it follows."""
    if number and len(set(sizes)) == 1:
        return sizes[0]
    for spec in checks.signature.inputs:
        for position, axis in enumerate(spec.shape):
            seen = [b[spec.name].shape[position] for b in checks.batches]
            if isinstance(axis, str) and tuple(seen) == sizes:
                return axis
    return "any"
