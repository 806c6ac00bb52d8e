"""What turns a text or an image into the inputs of the graph, as data.

Code that runs the model needs neither Keras nor this package: everything it
has to know is in `preprocessor.json` and the files that it names.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras_hub.layers import ImageConverter

from keras_peft.export.result import TensorSpec
from keras_peft.export.text import SENTENCE_PIECE_FILE
from keras_peft.export.text import TextPreprocessing
from keras_peft.export.text import describe_text


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The text or the image half of a preprocessor; neither for arrays."""

    text: TextPreprocessing | None = None
    image: dict[str, Any] | None = None

    def write(self, folder: Path) -> None:
        """Writes `preprocessor.json` and the tokenizer into `folder`."""
        settings: dict[str, Any] = {}
        if self.image is not None:
            settings["image"] = self.image
        if self.text is not None:
            settings["text"] = self.text.settings
            _write_tokenizer(self.text, folder)
        if settings:
            text = json.dumps(settings, indent=2, ensure_ascii=False)
            (folder / "preprocessor.json").write_text(text + "\n", "utf-8")


def describe_preprocessor(
    preprocessor: Any, inputs: Sequence[TensorSpec], texts: Sequence[str] = ()
) -> Preprocessing:
    """`preprocessor` as data, or nothing for `None`.

    Args:
        preprocessor: A keras-hub preprocessor, tokenizer or image converter.
        inputs: The inputs of the graph.
        texts: Lines of the user's own that the tokenizer is compared on.
    """
    if preprocessor is None:
        return Preprocessing()
    image = image_converter(preprocessor)
    if image is not None:
        return Preprocessing(image=_image_settings(image, inputs))
    return Preprocessing(text=describe_text(preprocessor, inputs, texts))


def image_converter(preprocessor: Any) -> ImageConverter | None:
    """The image half of `preprocessor`, if that is all it has."""
    if isinstance(preprocessor, ImageConverter):
        return preprocessor
    if getattr(preprocessor, "tokenizer", None) is not None:
        return None
    return getattr(preprocessor, "image_converter", None)


def _image_settings(
    converter: ImageConverter, inputs: Sequence[TensorSpec]
) -> dict[str, Any]:
    """Size and scaling; `mean` and `std` say the same in pixel values."""
    if len(inputs) != 1:
        raise ValueError(
            "An image converter feeds a model of one input. Pass "
            "`preprocessor=False` to leave it out of the folder. Received: "
            f"inputs={[spec.name for spec in inputs]}"
        )
    scale, offset = (
        _numbers(converter.scale, 1.0),
        _numbers(converter.offset, 0.0),
    )
    return {
        "input": inputs[0].name,
        "size": list(converter.image_size or ()),
        "scale": scale.tolist(),
        "offset": offset.tolist(),
        "mean": (-offset / scale).tolist(),
        "std": (1 / scale).tolist(),
        "interpolation": converter.interpolation,
        "antialias": converter.antialias,
        "crop_to_aspect_ratio": converter.crop_to_aspect_ratio,
        "pad_to_aspect_ratio": converter.pad_to_aspect_ratio,
        "data_format": keras.config.image_data_format(),
    }


def _numbers(value: Any, default: float) -> np.ndarray:
    return np.asarray(default if value is None else value, "float64")


def _write_tokenizer(text: TextPreprocessing, folder: Path) -> None:
    if text.tokenizer is not None:
        text.tokenizer.save(str(folder / "tokenizer.json"))
    if text.sentence_piece is not None:
        (folder / SENTENCE_PIECE_FILE).write_bytes(text.sentence_piece)
