"""Adapters that put virtual tokens in front of texts."""

import inspect

import keras
from keras import ops

from keras_peft.methods.adapter import CallAdapter
from keras_peft.methods.virtual_tokens import FIRST_ID
from keras_peft.methods.virtual_tokens import encodes_and_decodes
from keras_peft.methods.virtual_tokens import generates
from keras_peft.methods.virtual_tokens import is_backbone
from keras_peft.methods.virtual_tokens import own_targets
from keras_peft.methods.virtual_tokens import text_objection
from keras_peft.methods.virtual_tokens import text_paths
from keras_peft.methods.virtual_tokens import tokens_for


class TokenAdapter(CallAdapter):
    """An adapter that takes part as a whole, with the tokens, or not at all."""

    structural = True
    exclusive = True
    counts_positions = True

    def __init__(self, layer, shapes, name, tokens=None):
        self.tokens = tokens
        super().__init__(layer, shapes, name)

    @property
    def positions(self):
        return 0 if self.tokens is None else self.tokens.num_tokens

    def build_weights(self, shapes):
        for key, shape in shapes.items():
            # Read in float32: these are values, not factors of a product.
            setattr(self, key, self.weight(key, shape, autocast=False))


class EmbeddingAdapter(TokenAdapter):
    """At the token embedding: says what each virtual token is."""

    def embeddings(self):
        """The embeddings of the virtual tokens, `(num_tokens, units)`.

        Those before the text of a decoder follow, if there are any.
        """
        raise NotImplementedError

    def around(self, call, inputs, *args, **kwargs):
        reverse = kwargs.get("reverse", args[0] if args else False)
        if not self.present or reverse:
            return call(inputs, *args, **kwargs)
        ids = ops.cast(inputs, "int32")
        virtual = ids >= FIRST_ID
        words = call(ops.where(virtual, 0, ids), *args, **kwargs)
        index = ops.where(virtual, ids - FIRST_ID, 0)
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
        # Those of an encoder-decoder are its decoder's.
        decodes = hasattr(super(), "call_decoder_with_cache")
        if tokens.decoder_ids or not decodes:
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
            changed = tokens.before({key: arguments[key]})
            if tokens.decoder_ids:
                key = "self_attention_cache_update_index"
                changed[key] = arguments[key] + tokens.num_tokens
            return changed

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

    # Whether others stand before the text of an encoder-decoder's decoder.
    decoder = False

    def accepts(self, layer):
        return (
            isinstance(layer, keras.layers.Embedding)
            or is_backbone(layer)
            or generates(layer)
        )

    def default_targets(self, candidates):
        return text_paths(candidates.model, self)

    def objection(self, path, layer):
        against = text_objection(layer, self.num_tokens)
        if against is None and self.decoder and is_backbone(layer):
            if not encodes_and_decodes(layer):
                return "it is no encoder-decoder, so leave `decoder=True` out"
        return against

    def all_shapes(self, layers):
        embedding = the_embedding(layers, self)
        return {
            path: self.shapes(path, layer) if path == embedding else {}
            for path, layer in layers.items()
        }

    def create_all(self, layers, name):
        embedding = the_embedding(layers, self)
        end = FIRST_ID + self.num_tokens
        later = range(end, end + self.num_tokens) if self.decoder else ()
        tokens = tokens_for(layers, range(FIRST_ID, end), later)
        created = {}
        for path, layer in layers.items():
            if path == embedding:
                created[path] = self.create(path, layer, name, tokens)
            else:
                created[path] = passing_adapter(layer, name, tokens)
        return created


def passing_adapter(layer, name, tokens):
    """The adapter of a layer that only lets the tokens pass."""
    kind = BackboneAdapter if is_backbone(layer) else TaskAdapter
    return kind(layer, {}, name, tokens)


def the_embedding(layers, method):
    """The path of the only embedding among `layers`, beside a backbone."""
    found = [
        path
        for path, layer in layers.items()
        if isinstance(layer, keras.layers.Embedding)
    ]
    if len(found) != 1 or not any(map(is_backbone, layers.values())):
        raise ValueError(own_targets(layers, method))
    return found[0]
