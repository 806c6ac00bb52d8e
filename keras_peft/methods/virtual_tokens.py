"""Tokens that stand in front of a text, for every keras-hub backbone.

The backbone's adapter puts ids that no vocabulary has in front of the token
ids, and cuts their positions off the outputs. In between every layer treats
them as it treats words: positions, masks and caches need no code of their own.
What such a token is, the token embedding's adapter says, or the attention's.
"""

import contextlib
import inspect

import keras
from keras import ops

from keras_peft import layer_tree
from keras_peft.methods.adapter import CallAdapter
from keras_peft.patterns import lies_in

# Above every vocabulary, and far enough that an id which is just too large is
# the error that it was without the adapter.
_FIRST_ID = 2**30

# What can be put before each input, by the end of its name.
_FILL = {"token_ids": None, "padding_mask": 1, "segment_ids": 0}


# -- Where they go -----------------------------------------------------------


def is_backbone(layer):
    """Whether `layer` is a keras-hub backbone."""
    return any(
        kind.__name__ == "Backbone" and kind.__module__.startswith("keras_hub")
        for kind in type(layer).__mro__
    )


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
    others = [key for key in inputs if not _fills(key)]
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


def _fills(key):
    return any(key.endswith(end) for end in _FILL)


def position_limit(backbone):
    """How many positions the backbone has learned, or `None`."""
    lengths = [
        layer.sequence_length
        for _, layer in layer_tree.walk(backbone)
        if hasattr(layer, "position_embeddings")
        and hasattr(layer, "sequence_length")
    ]
    return min(lengths, default=None)


# -- Putting them in front ---------------------------------------------------


class VirtualTokens:
    """What the adapters of one method in one model share.

    Attributes:
        ids: The ids that stand in front.
        limit: The positions that the backbone has, or `None`.
        inside: Whether the layers are being called on them right now.
    """

    def __init__(self, ids, limit):
        self.ids = list(ids)
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
        """A dict of model inputs, each longer by `num_tokens` in front.

        Of an encoder-decoder, those of the encoder.
        """
        encodes = any(key.startswith("encoder_") for key in inputs)
        ends = ("token_ids", "padding_mask", "segment_ids")
        keys = [f"encoder_{end}" if encodes else end for end in ends]
        longer = dict(inputs)
        for end, key in zip(ends, keys, strict=True):
            if inputs.get(key) is not None:
                longer[key] = self._longer(inputs[key], _FILL[end], key)
        return longer

    def _longer(self, values, fill, key):
        if fill is None:
            values = ops.cast(values, "int32")
            length = values.shape[1]
            total = None if length is None else length + self.num_tokens
            if None not in (total, self.limit) and total > self.limit:
                raise ValueError(
                    f"{self.num_tokens} tokens in front of {length} make "
                    f"{total}, but the model has {self.limit} positions. Use "
                    f"texts of at most {self.limit - self.num_tokens} tokens: "
                    "`model.preprocessor.sequence_length` and the "
                    "`max_length` of `generate` set it. "
                    f"Received: {key} of shape {tuple(values.shape)}"
                )
        column = ops.zeros_like(values[:, :1])
        if fill is None:
            added = column + ops.convert_to_tensor(self.ids, "int32")
        else:
            column = ops.full_like(column, fill)
            added = ops.repeat(column, self.num_tokens, axis=1)
        return ops.concatenate([added, values], axis=1)

    def cut(self, outputs):
        """`outputs` without the positions of the tokens in front."""
        if isinstance(outputs, dict):
            return {
                key: value if key.startswith("decoder_") else self.cut(value)
                for key, value in outputs.items()
            }
        return outputs[:, self.num_tokens :] if outputs.ndim > 2 else outputs


# -- Adapters ----------------------------------------------------------------


class TokenAdapter(CallAdapter):
    """An adapter that takes part as a whole, with the tokens, or not at all."""

    structural = True
    exclusive = True

    def __init__(self, layer, shapes, name, tokens=None):
        self.tokens = tokens
        super().__init__(layer, shapes, name)

    def build_weights(self, shapes):
        for key, shape in shapes.items():
            # Read in float32: these are values, not factors of a product.
            setattr(self, key, self.weight(key, shape, autocast=False))


class EmbeddingAdapter(TokenAdapter):
    """At the token embedding: says what each virtual token is."""

    def embeddings(self):
        """The embeddings of the virtual tokens, `(num_tokens, units)`."""
        raise NotImplementedError

    def around(self, call, inputs, *args, **kwargs):
        reverse = kwargs.get("reverse", args[0] if args else False)
        if not self.present or reverse:
            return call(inputs, *args, **kwargs)
        ids = ops.cast(inputs, "int32")
        virtual = ids >= _FIRST_ID
        words = call(ops.where(virtual, 0, ids), *args, **kwargs)
        index = ops.where(virtual, ids - _FIRST_ID, 0)
        prompt = ops.take(
            ops.cast(self.embeddings(), words.dtype), index, axis=0
        )
        return ops.where(virtual[..., None], prompt, words)


class BackboneAdapter(TokenAdapter):
    """At the backbone: puts the tokens in front and cuts them off again."""

    def around(self, call, inputs, *args, **kwargs):
        if not self.present:
            return call(inputs, *args, **kwargs)
        if not isinstance(inputs, dict):
            raise ValueError(
                "With tokens in front, the backbone takes a dict of inputs by "
                f"name. Received: {type(inputs).__name__}"
            )
        inputs = self.tokens.before(inputs)
        with self.tokens.standing_in_front():
            outputs = call(inputs, *args, **kwargs)
        return self.tokens.cut(outputs)


class GeneratingTask:
    """Mixed into a task that generates: its cache begins with the tokens."""

    def _tokens_in_front(self):
        for adapter in self.adapters.values():
            if isinstance(adapter, TaskAdapter) and adapter.present:
                return adapter.tokens
        return None

    def _build_cache(self, *args, **kwargs):
        tokens, build = self._tokens_in_front(), super()._build_cache
        if tokens is None:
            return build(*args, **kwargs)
        bound = inspect.signature(build).bind(*args, **kwargs)
        bound.arguments.update(tokens.before(bound.arguments))
        with tokens.standing_in_front():
            hidden, *rest = build(*bound.args, **bound.kwargs)
        if not hasattr(super(), "call_decoder_with_cache"):
            hidden = tokens.cut(hidden)
        return hidden, *rest

    def call_with_cache(self, *args, **kwargs):
        def later(tokens, arguments):
            index = arguments["cache_update_index"]
            return {"cache_update_index": index + tokens.num_tokens}

        return self._later_step(super().call_with_cache, later, args, kwargs)

    def call_decoder_with_cache(self, *args, **kwargs):
        def longer(tokens, arguments):
            key = "encoder_padding_mask"
            return tokens.before({key: arguments[key]})

        call = super().call_decoder_with_cache
        return self._later_step(call, longer, args, kwargs)

    def _later_step(self, call, changed, args, kwargs):
        tokens = self._tokens_in_front()
        if tokens is None or tokens.inside:
            return call(*args, **kwargs)
        bound = inspect.signature(call).bind(*args, **kwargs)
        bound.arguments.update(changed(tokens, bound.arguments))
        return call(*bound.args, **bound.kwargs)

    def score(self, *args, **kwargs):
        if self._tokens_in_front() is None:
            return super().score(*args, **kwargs)
        raise ValueError(
            "`score` calls the layers of the backbone one by one, without the "
            "tokens that an adapter puts in front. Use the outputs of "
            "`model(inputs)`, or `keras_peft.disabled(model)` for the base. "
            f"Received: adapters={list(self.adapters)}"
        )


class TaskAdapter(TokenAdapter):
    """At a task that generates."""

    mixin = GeneratingTask

    def around(self, call, *args, **kwargs):
        return call(*args, **kwargs)


# -- Methods -----------------------------------------------------------------


class InFrontOfText:
    """Mixed into a method whose tokens the token embedding gives out."""

    def accepts(self, layer):
        return (
            isinstance(layer, keras.layers.Embedding)
            or is_backbone(layer)
            or generates(layer)
        )

    def default_targets(self, candidates):
        return text_paths(candidates.model, self)

    def objection(self, path, layer):
        return text_objection(layer, self.num_tokens)

    def all_shapes(self, layers):
        embedding = the_embedding(layers, self)
        return {
            path: self.shapes(path, layer) if path == embedding else {}
            for path, layer in layers.items()
        }

    def create_all(self, layers, name):
        embedding = the_embedding(layers, self)
        ids = range(_FIRST_ID, _FIRST_ID + self.num_tokens)
        tokens = tokens_for(layers, self, ids)
        created = {}
        for path, layer in layers.items():
            if path == embedding:
                created[path] = self.create(path, layer, name, tokens)
            else:
                created[path] = passing_adapter(layer, name, tokens)
        return created


def tokens_for(layers, method, ids):
    """The `VirtualTokens` of `ids` for `layers`, which have a backbone."""
    backbone = next((la for la in layers.values() if is_backbone(la)), None)
    if backbone is None:
        raise ValueError(_own_targets(layers, method))
    return VirtualTokens(ids, position_limit(backbone))


def passing_adapter(layer, name, tokens):
    """The adapter of a layer that only lets the tokens pass."""
    kind = BackboneAdapter if is_backbone(layer) else TaskAdapter
    return kind(layer, {}, name, tokens)


def the_embedding(layers, method):
    """The path of the only embedding among `layers`."""
    found = [
        path
        for path, layer in layers.items()
        if isinstance(layer, keras.layers.Embedding)
    ]
    if len(found) != 1:
        raise ValueError(_own_targets(layers, method))
    return found[0]


def _own_targets(layers, method):
    return (
        f"{type(method).__name__} needs the backbone, its token embedding and "
        "the task that generates, and finds them itself. Leave `targets` out. "
        f"Received: targets={list(layers)}"
    )
