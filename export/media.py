"""Images among the tokens of a text: how many places of it they take."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import keras
import numpy as np

if TYPE_CHECKING:
    from keras_peft.export.signature import ModelInput
    from keras_peft.export.signature import Signature

_INDICES = "vision_indices"


def settle(
    model: keras.Model,
    signature: "Signature",
    sizes: Mapping[str, int],
    images: int,
) -> dict[str, int]:
    """Sizes that fit so many images in every text.

    A text has a place for every token of an image, beside its own.
    """
    settled = dict(sizes)
    shapes = {i.name: i.shape for i in signature.inputs}
    if _INDICES not in shapes or "images" not in shapes:
        return settled
    places = images * _tokens_per_image(model)
    for name, size in (("images", images), (_INDICES, places)):
        settled[str(shapes[name][1])] = size
    length = shapes["token_ids"][1]
    if length in settled:
        settled[length] += places
    return settled


def make(spec: "ModelInput", sizes: Mapping[str, int]) -> np.ndarray | None:
    """Where the images stand: behind the first token, one after the other."""
    places = sizes.get(f"{_INDICES}_sequence")
    if places is None or spec.name not in (_INDICES, "vision_mask"):
        return None
    shape = spec.sized(sizes)
    standing = np.arange(1, shape[1] + 1)
    if spec.name == _INDICES:
        return np.broadcast_to(standing, shape)
    return np.broadcast_to((standing > 1) & (standing <= places + 1), shape)


def _tokens_per_image(model: keras.Model) -> int:
    found = [
        getattr(layer, "num_vision_tokens_per_image", None)
        for layer in model._flatten_layers()
    ]
    return max((n for n in found if isinstance(n, int)), default=1)
