"""A model beside the inputs it is traced and checked on."""

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_peft.export import comparison
from keras_peft.export import samples
from keras_peft.export.result import Forward
from keras_peft.export.result import Verification
from keras_peft.export.signature import Signature
from keras_peft.export.signature import fix_constant_axes
from keras_peft.export.signature import read_signature

_STEPS = (None, "float16", "int8")

# Of float inputs: far above float32's rounding, and small for any model.
_CHANGE = 2.0**-16
# A model that magnifies more would pass with any graph.
_MOST_MAGNIFIED = 128.0


@dataclasses.dataclass(frozen=True)
class Checks:
    """What a model gives for batches of several sizes.

    Attributes:
        model: The Keras model.
        signature: Its inputs.
        sample: The batch to trace with.
        batches: The batches to check with, none of the sample's sizes.
        typical: A longer batch, to learn the ranges of inner values from.
        references: Outputs of the model for every one of `batches`, flat.
    """

    model: keras.Model
    signature: Signature
    sample: samples.Batch
    batches: list[samples.Batch]
    typical: samples.Batch
    references: list[list[np.ndarray]]

    def compare(
        self, forward: Forward, step: str, tolerance: float | None
    ) -> Verification:
        """Runs a file on the same batches."""
        return comparison.compare(
            forward, self.batches, self.references, step, tolerance
        )

    def compare_exactly(self, forward: Forward, bound: float) -> Verification:
        """Holds float32 outputs to `bound`, what rounding may add up to.

        A model that magnifies changes of its inputs, as untrained networks of
        many layers do, magnifies rounding too: its bound is so much larger.
        """
        check = self.compare(forward, "float32", bound)
        if check.relative <= bound:
            return check
        bound *= self.magnification()
        return dataclasses.replace(check, tolerance=bound)

    def magnification(self) -> float:
        """How many times larger a change of float inputs is in the outputs.

        From 1, also for inputs that are numbers of tokens, to 128.
        """
        rng = np.random.default_rng(0)
        found = 1.0
        for batch, references in zip(
            self.batches, self.references, strict=True
        ):
            moved = {n: _moved(value, rng) for n, value in batch.items()}
            outputs = _outputs(self.model, self.signature, moved)
            for output, reference in zip(outputs, references, strict=True):
                change = comparison.relative(output, reference)
                found = max(found, change / _CHANGE)
        return min(found, _MOST_MAGNIFIED)

    def on(self, batches: list[samples.Batch]) -> "Checks":
        """The same checks on other batches."""
        references = [
            _outputs(self.model, self.signature, batch) for batch in batches
        ]
        return dataclasses.replace(self, batches=batches, references=references)


def check_exportable(
    model: keras.Model,
    quantize: str | None,
    extra: str,
    packages: Sequence[str],
) -> None:
    """Finds what speaks against an export before any work is done.

    Raises:
        ValueError: If `quantize` is unknown, or Keras quantized the model.
        ImportError: If one of the `packages`, which `extra` brings, is
            missing.
    """
    if quantize not in _STEPS:
        raise ValueError(
            "`quantize` names the numbers the file stores: None for float32, "
            f"'float16' or 'int8'. Received: quantize={quantize!r}"
        )
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise ImportError(
            "Exporting needs packages that are not installed; get them with "
            f"`pip install keras-peft[{extra}]`. Received: no {missing}"
        )
    quantized = [
        layer.path
        for layer in model._flatten_layers()
        if getattr(layer, "quantization_mode", None)
    ]
    if quantized:
        raise ValueError(
            "Weights that Keras quantized would come back in float, or in a "
            "file that does not run. Export the float model and quantize "
            "the graph with `quantize='int8'`. Received: quantized layers "
            f"{quantized[:5]}{'...' if len(quantized) > 5 else ''}"
        )


def prepare_checks(model: keras.Model, calibration: Any) -> Checks:
    """Makes inputs up, adds the user's, and asks the model about all.

    Raises:
        ValueError: If the model does not take made-up inputs and there are
            not two batches of the user's to replace them.
    """
    signature = read_signature(model)
    given = []
    if calibration is not None:
        given = samples.read_batches(signature, calibration)
    try:
        return _made_up(model, signature, given)
    except Exception as error:
        if len(given) < 2:
            raise ValueError(
                "The model does not take inputs made up from its input "
                "specs. Pass two batches of real inputs of different sizes "
                "as `calibration`, no free size being 1 in the first. "
                f"Received from the model: {error}"
            ) from error
    signature = fix_constant_axes(signature, given)
    references = [_outputs(model, signature, batch) for batch in given[1:]]
    return Checks(model, signature, given[0], given[1:], given[0], references)


def enforce(check: Verification) -> None:
    """Raises where a file is further from the model than it may be."""
    if check.tolerance is None or check.relative <= check.tolerance:
        return
    raise ValueError(
        f"The {check.step} file differs from the model by more than the "
        f"tolerance of {check.tolerance:.2g}; it was discarded. Give a larger "
        "`tolerance` if the difference is acceptable. Received: relative "
        f"difference {check.relative:.3g}, cosine {check.cosine:.5f}"
    )


def _made_up(
    model: keras.Model, signature: Signature, given: list[samples.Batch]
) -> Checks:
    sizes = samples.trace_sizes(model, signature)
    sample = samples.make_batch(model, signature, sizes, seed=2)
    batches = [
        samples.make_batch(model, signature, sizes, seed)
        for seed, sizes in enumerate(samples.check_sizes(model, signature))
    ]
    batches += given
    references = [_outputs(model, signature, batch) for batch in batches]
    sizes = samples.typical_sizes(model, signature)
    typical = samples.make_batch(model, signature, sizes, seed=3)
    return Checks(model, signature, sample, batches, typical, references)


def _moved(value: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if value.dtype.kind != "f":
        return value
    signs = rng.choice([-1.0, 1.0], value.shape)
    return (value * (1.0 + _CHANGE * signs)).astype(value.dtype)


def _outputs(
    model: keras.Model, signature: Signature, batch: samples.Batch
) -> list[np.ndarray]:
    return comparison.reference_outputs(model, signature, batch)
