"""A model of keras-hub with its cache, as onnxruntime-genai hands it over.

Keras-hub keeps the keys and values of all layers in one array, with room for
what is to come. Here each layer has two, which grow with the text.
"""

import dataclasses
from typing import Any

import keras

from keras_peft.export.genai import families
from keras_peft.export.genai.facts import Facts
from keras_peft.export.litert import decoder as caches
from keras_peft.export.patches import cache_update
from keras_peft.export.patches import short_prompt
from keras_peft.export.signature import ModelInput
from keras_peft.export.signature import Signature
from keras_peft.export.signature import read_signature

IDS, MASK, LOGITS = "input_ids", "attention_mask", "logits"
KINDS = ("key", "value")

_HEADS = ("num_query_heads", "num_attention_heads", "num_heads")
_LENGTHS = ("sequence_length", "max_sequence_length", "max_position_embeddings")


@dataclasses.dataclass(frozen=True)
class CachedSignature(Signature):
    """New tokens, and keys and values of those before them.

    Attributes:
        length_axis: The axis of keras-hub's array that tokens lie on.
    """

    length_axis: int = 3

    def call(self, model: Any, tensors: dict[str, Any]) -> list[Any]:
        """Logits of the new tokens, and keys and values with theirs."""
        ids = keras.ops.cast(tensors[IDS], "int32")
        cache = self._joined([tensors[name] for name in self.names[1:]])
        sizes = list(keras.ops.shape(cache))
        past = sizes[self.length_axis]
        sizes[self.length_axis] = keras.ops.shape(ids)[1]
        room = keras.ops.zeros(sizes, cache.dtype)
        cache = keras.ops.concatenate([cache, room], self.length_axis)
        with cache_update.patched(), short_prompt.patched():
            logits, _, cache = model.call_with_cache(ids, cache, past)
        return [logits, *self._parted(cache)]

    def _joined(self, parts: list[Any]) -> Any:
        """`[batch, layers, 2, ...]`, as keras-hub has it."""
        layers = [
            keras.ops.stack(parts[n : n + 2], axis=1)
            for n in range(0, len(parts), 2)
        ]
        cache = keras.ops.stack(layers, axis=1)
        return keras.ops.moveaxis(cache, 4, self.length_axis)

    def _parted(self, cache: Any) -> list[Any]:
        cache = keras.ops.moveaxis(cache, self.length_axis, 4)
        return [
            cache[:, layer, kind]
            for layer in range(len(self.names) // 2)
            for kind in range(2)
        ]


def output_names(signature: CachedSignature) -> list[str]:
    """Names of what it gives."""
    past, present = "past_key_values.", "present."
    return [LOGITS, *(n.replace(past, present) for n in signature.names[1:])]


def read(model: Any) -> tuple[CachedSignature, Facts]:
    """How `model` is called with its cache, and what it is.

    Raises:
        ValueError: If it takes more than text, or keeps something else than
            keys and values.
    """
    inputs = read_signature(model)
    # A cache knows the positions of its tokens.
    of_text = {caches.TOKENS, "padding_mask"}
    takes_text = of_text == {*inputs.names} - {"position_ids"}
    if not (takes_text and hasattr(model, "call_with_cache")):
        raise _refused(
            model,
            "a cache is traced of a model with keras-hub's `call_with_cache` "
            f"that takes text alone, and this one takes {inputs.names}",
        )
    hidden, small = caches.new_cache(model, 2, 11)
    _, large = caches.new_cache(model, 3, 13)
    shapes = [
        (tuple(a.shape), tuple(b.shape))
        for a, b in zip(
            keras.tree.flatten(small), keras.tree.flatten(large), strict=True
        )
    ]
    axis = _length_axis(shapes)
    if axis is None:
        raise _refused(
            model,
            "its cache is not one array `[batch, layers, 2, ...]` of keys and "
            f"values, but of shapes {[shape for shape, _ in shapes]} for 2 "
            "texts of 11 tokens",
        )
    shape = list(shapes[0][0])
    del shape[axis]
    _, layers, _, heads, size = shape
    facts = Facts(
        vocabulary_size=model.output.shape[-1],
        hidden_size=hidden.shape[-1],
        num_layers=layers,
        num_heads=_number(model.backbone, _HEADS) or heads,
        num_kv_heads=heads,
        head_size=size,
        kernels=_kernels(model),
        context_length=_context_length(model),
        shares_buffer=False,
    )
    return _signature(facts, axis), facts


def _signature(facts: Facts, length_axis: int) -> CachedSignature:
    shape = ("batch", facts.num_kv_heads, "past", facts.head_size)
    inputs = [ModelInput(IDS, "int64", ("batch", "tokens"))]
    inputs += [
        ModelInput(f"past_key_values.{n}.{kind}", "float32", shape)
        for n in range(facts.num_layers)
        for kind in KINDS
    ]
    names = [each.name for each in inputs]
    return CachedSignature(tuple(inputs), names, length_axis=length_axis)


def _length_axis(shapes: Any) -> int | None:
    """Where tokens lie in the only array, if it is one of keys and values."""
    if len(shapes) != 1 or len(shapes[0][0]) != 6:
        return None
    small, large = shapes[0]
    sizes = list(zip(small, large, strict=True))
    grows = [n for n, (one, other) in enumerate(sizes) if one != other]
    if grows not in ([0, 3], [0, 4]) or sizes[grows[1]] != (11, 13):
        return None
    return grows[1] if small[2] == 2 else None


def _kernels(model: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(v.shape for v in model.variables if len(v.shape) > 1)


def _number(layer: Any, names: tuple[str, ...]) -> int | None:
    found = [getattr(layer, name, None) for name in names]
    return next((n for n in found if isinstance(n, int)), None)


def _context_length(model: Any) -> int | None:
    """How many places every layer of the backbone knows."""
    layers = model.backbone._flatten_layers()
    found = [_number(layer, _LENGTHS) for layer in layers]
    return min((n for n in found if n is not None), default=None)


def _refused(model: Any, reason: str) -> ValueError:
    return families.undescribed(
        model, f" Its own cache cannot be traced instead: {reason}."
    )
