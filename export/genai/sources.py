"""Where a decoder's graph comes from: its family's description, or a trace."""

from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from typing import Protocol

import keras

from keras_peft.export.blockwise import Blockwise
from keras_peft.export.genai import checks
from keras_peft.export.genai import families
from keras_peft.export.genai import graph
from keras_peft.export.genai.calibrate import calibrated
from keras_peft.export.genai.calibrate import calibration_rows
from keras_peft.export.genai.facts import Facts
from keras_peft.export.genai.facts import facts_of
from keras_peft.export.genai.plan import BITS
from keras_peft.export.genai.plan import plan_storage
from keras_peft.export.genai.plan import trained_integers
from keras_peft.export.genai.shelf import Shelf
from keras_peft.quantize_aware import integers


class Source(Protocol):
    """What writes the files of one model.

    Attributes:
        facts: The decoder's sizes.
        notes: Sentences a user should read.
    """

    facts: Facts
    notes: list[str]

    def write(
        self,
        folder: Path,
        context_length: int,
        shelf: Shelf,
        quantize: str | None = None,
        calibration: Sequence[str] | None = None,
    ) -> None:
        """Writes the graph, its weights, and the adapters of a shelf.

        `folder` holds the tokenizer where there is `calibration`.
        """


def read(
    model: keras.Model,
    quantize: str | None = None,
    calibration: Sequence[str] | None = None,
    adapters: Mapping[str, Any] | None = None,
) -> Source:
    """The source for a model, and for what is asked of it.

    Raises:
        ValueError: If there is none, or it cannot do that.
    """
    if families.is_described(model):
        return Described(model)
    from keras_peft.export.genai.traced import Traced

    source = Traced(model)
    source.check(quantize, calibration, adapters)
    return source


class Described:
    """A graph made of a description, in ONNX Runtime's own operators."""

    def __init__(self, model: keras.Model):
        self.decoder = families.describe(model)
        checks.check_weights(self.decoder)
        self.facts = facts_of(self.decoder)
        self.notes: list[str] = []
        self._model = model

    def write(
        self,
        folder: Path,
        context_length: int,
        shelf: Shelf,
        quantize: str | None = None,
        calibration: Sequence[str] | None = None,
    ) -> None:
        """See `Source`."""
        known: dict[str, Blockwise] = {}
        if quantize is not None and quantize in BITS:
            known = trained_integers(self.decoder, integers(self._model))
            if calibration is not None:
                rows = calibration_rows(
                    calibration, folder / "tokenizer.json", context_length
                )
                known |= calibrated(
                    self.decoder, rows, context_length, known, BITS[quantize]
                )
        plan = plan_storage(self.decoder, quantize, known)
        built = graph.build(self.decoder, plan, shelf.slots, context_length)
        graph.save(built, folder)
        shelf.write(built, self.decoder, folder)
