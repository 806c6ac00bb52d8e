"""Tokens that stand in front of a text, for every keras-hub backbone.

The backbone's adapter puts ids that no vocabulary has in front of the token
ids, and cuts their positions off the outputs. In between every layer treats
them as it treats words: positions, masks and caches need no code of their own.
What such a token is, the token embedding's adapter says, or the attention's.
"""

import contextlib

import keras
from keras import ops

from keras_peft import layer_tree
from keras_peft.patterns import lies_in

# Above every vocabulary, and far enough that an id which is just too large is
# the error that it was without the adapter.
FIRST_ID = 2**30

# Ends of the names of inputs that can be made longer.
_ENDS = ("token_ids", "padding_mask", "segment_ids")


# -- Where they go -----------------------------------------------------------


def is_backbone(layer):
    """Whether `layer` is a keras-hub backbone."""
    return any(
        kind.__name__ == "Backbone" and kind.__module__.startswith("keras_hub")
        for kind in type(layer).__mro__
    )


def encodes_and_decodes(backbone):
    """Whether `backbone` reads two texts, one of them by its decoder."""
    inputs = backbone.input if isinstance(backbone.input, dict) else {}
    return any(key.startswith("decoder_") for key in inputs)


def generates(layer):
    """Whether `layer` is a task that writes text with a cache."""
    return hasattr(layer, "_build_cache") and hasattr(layer, "backbone")


def only_backbone(model, method):
    """`(path, backbone)` of the one keras-hub backbone of `model`.

    Raises:
        ValueError: if it has none, or several beside each other.
    """
    found = {
        path: layer
        for path, layer in layer_tree.layers_by_path(model).items()
        if is_backbone(layer)
    }
    outer = [
        path
        for path in found
        if path == ""
        or ("" not in found and not lies_in(path, found.keys() - {path}))
    ]
    if len(outer) != 1:
        raise ValueError(
            f"{type(method).__name__} needs a model with one keras-hub "
            f"backbone, such as a `keras_hub.models.CausalLM`; "
            f"`{model.name}` has {len(outer)}. "
            f"Received: model of class {layer_tree.base_class(model).__name__}"
        )
    return outer[0], found[outer[0]]


def text_paths(model, method):
    """`[embedding, backbone, task that generates]`, the last if there is one.

    Raises:
        ValueError: if `model` has no such backbone with a token embedding.
    """
    at, backbone = only_backbone(model, method)
    layers = layer_tree.layers_by_path(model)
    embedding = getattr(backbone, "token_embedding", None)
    embeddings = [path for path, la in layers.items() if la is embedding]
    if not embeddings:
        raise ValueError(
            f"{type(method).__name__} needs a text model: the backbone "
            f"`{backbone.name}` has no token embedding. "
            f"Received: {layer_tree.base_class(backbone).__name__}"
        )
    tasks = [
        path
        for path, layer in layers.items()
        if generates(layer) and layer.backbone is backbone
    ]
    return [*embeddings, at, *tasks]


def text_objection(layer, num_tokens):
    """Why no token can be put in front of what `layer` reads, or `None`."""
    if not is_backbone(layer):
        return None
    inputs = layer.input if isinstance(layer.input, dict) else {}
    others = [key for key in inputs if not key.endswith(_ENDS)]
    if others or not inputs:
        return (
            f"it also reads {', '.join(others) or 'inputs without names'}, "
            "which would have to move with the tokens"
        )
    limit = position_limit(layer)
    if limit is not None and num_tokens >= limit:
        return (
            f"num_tokens={num_tokens} leaves no room in its {limit} positions"
        )
    own = layer.token_embedding
    same = [
        other
        for _, other in layer_tree.walk(layer)
        if isinstance(other, keras.layers.Embedding)
        and other is not own
        and other.input_dim == own.input_dim
    ]
    if same:
        return f"it embeds tokens a second time, in `{same[0].name}`"
    return None


def has_positions(layer):
    """Whether `layer` holds an embedding of each position."""
    return hasattr(layer, "position_embeddings") and hasattr(
        layer, "sequence_length"
    )


def position_limit(layer):
    """How many positions `layer` and what it holds have, or `None`."""
    inside = [layer, *(below for _, below in layer_tree.walk(layer))]
    lengths = [la.sequence_length for la in inside if has_positions(la)]
    return min(lengths, default=None)


# -- Putting them in front ---------------------------------------------------


class VirtualTokens:
    """What the adapters of one method in one model share.

    Attributes:
        ids: The ids that stand in front.
        decoder_ids: As many before a decoder's own text, or none: those in
            front of an encoder-decoder are before the encoder's.
        limit: The positions that the backbone has, or `None`.
        inside: Whether the layers are being called on them right now.
    """

    def __init__(self, ids, limit, decoder_ids=()):
        self.ids = list(ids)
        self.decoder_ids = list(decoder_ids)
        self.num_tokens = len(self.ids)
        self.limit = limit
        self.inside = False

    @contextlib.contextmanager
    def standing_in_front(self):
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def before(self, inputs):
        """A dict of model inputs, each longer by `num_tokens` in front."""
        if not any(key.startswith("encoder_") for key in inputs):
            return self._before(inputs, "", self.ids)
        longer = self._before(inputs, "encoder_", self.ids)
        if self.decoder_ids:
            longer = self._before(longer, "decoder_", self.decoder_ids)
        return longer

    def _before(self, inputs, start, ids):
        longer = dict(inputs)
        for end, added in zip(
            _ENDS, (ids, [1] * len(ids), [0] * len(ids)), strict=True
        ):
            key = start + end
            if inputs.get(key) is not None:
                # Smaller integers would not hold the ids.
                dtype = "int32" if added is ids else inputs[key].dtype
                values = ops.cast(inputs[key], dtype)
                self.check_length(values.shape[1])
                longer[key] = _longer(values, added)
        return longer

    def check_length(self, length):
        """Raises a `ValueError` if a text has no room behind the tokens."""
        if self.limit is None or length is None:
            return
        room = self.limit - self.num_tokens
        if length > room:
            raise ValueError(
                f"{self.num_tokens} of the model's {self.limit} positions are "
                f"taken by an adapter. Use texts of at most {room} tokens, by "
                "the `sequence_length` of `model.preprocessor` or the "
                "`max_length` of `generate()`. "
                f"Received: a text of {length} tokens"
            )

    def cut(self, outputs):
        """`outputs` without the positions of the tokens in front."""
        if isinstance(outputs, dict):
            whole = () if self.decoder_ids else ("decoder_",)
            return {
                key: value if key.startswith(whole) else self.cut(value)
                for key, value in outputs.items()
            }
        return outputs[:, self.num_tokens :] if outputs.ndim > 2 else outputs


def _longer(values, added):
    """`values` of shape `(batch, length)` with a list before each row."""
    added = ops.convert_to_tensor(added, "int32")
    added = ops.zeros_like(values[:, :1], dtype="int32") + added
    return ops.concatenate([ops.cast(added, values.dtype), values], axis=1)


def tokens_for(layers, ids, decoder_ids=()):
    """The `VirtualTokens` of these ids that the adapters of `layers` share."""
    limits = [position_limit(layer) for layer in layers.values()]
    known = [limit for limit in limits if limit is not None]
    return VirtualTokens(ids, min(known, default=None), decoder_ids)


def own_targets(layers, method):
    """The message for layers that the method cannot have found itself."""
    return (
        f"{type(method).__name__} needs the backbone, its token embedding and "
        "the task that generates, and finds them itself. Leave `targets` out. "
        f"Received: targets={list(layers)}"
    )
