"""Prefix tuning: learned keys and values in front of every attention."""

import inspect

import keras

from keras_peft import layer_tree
from keras_peft.blocks import find_blocks
from keras_peft.kernels import EinsumKernel
from keras_peft.kernels import has_kernel
from keras_peft.kernels import kernel_of
from keras_peft.methods.method import Method
from keras_peft.methods.prefix_adapters import AttentionAdapter
from keras_peft.methods.prefix_adapters import BiasedAttentionAdapter
from keras_peft.methods.prefix_adapters import CausalAttentionAdapter
from keras_peft.methods.prefix_adapters import PositionAdapter
from keras_peft.methods.prefix_adapters import ProjectionAdapter
from keras_peft.methods.settings import check_positive_integer
from keras_peft.methods.token_adapters import passing_adapter
from keras_peft.methods.virtual_tokens import generates
from keras_peft.methods.virtual_tokens import has_positions
from keras_peft.methods.virtual_tokens import is_backbone
from keras_peft.methods.virtual_tokens import text_objection
from keras_peft.methods.virtual_tokens import text_paths
from keras_peft.methods.virtual_tokens import tokens_for


@keras.saving.register_keras_serializable(package="keras_peft")
class PrefixTuning(Method):
    """Prefix tuning: `num_tokens` learned keys and values per attention.

    Every self-attention computes
    `softmax(Q @ [PK; K].T / sqrt(d)) @ [PV; V]`, with keys `PK` and values
    `PV` of its own, which all queries see and which are neither rotated nor
    normed. The text's positions begin after the prefix, so where positions
    are learned it has `num_tokens` less. Trainable parameters:
    `num_tokens * layers * 2 * heads * head_dim`, of the heads that keys and
    values have. It cannot be merged.

    With `hidden_dim`, a network shared by all layers computes them from
    learned inputs `X` of shape `(num_tokens, k)`, `k = heads * head_dim`:
    `tanh(X @ A + a) @ B + b`. That trains more steadily, by
    `num_tokens * k + (k + 1) * h + (h + 1) * layers * 2 * k` parameters,
    where `h = hidden_dim`.

    It fits the text decoders of keras-hub, alone or in a task, where
    `generate()` keeps the prefix in its cache, T5, and any other model whose
    blocks attend by `keras.layers.MultiHeadAttention`, such as BERT, ViT and
    BART. In an encoder-decoder the encoder and the decoder have prefixes,
    each self-attention its own, and attention from one to the other has none.
    T5's scores get no bias of relative positions where keys are learned.

    - [Li and Liang, 2021](https://arxiv.org/abs/2101.00190)

    Args:
        num_tokens: Positive integer. Length of the prefix; 10 to 100 is usual.
        hidden_dim: Positive integer, width of the network, or `None` for the
            keys and values themselves. 512 is usual.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
    >>> keras_peft.adapt(causal_lm, keras_peft.PrefixTuning(num_tokens=20))
    """

    def __init__(self, num_tokens=20, hidden_dim=None):
        check_positive_integer("num_tokens", num_tokens, "10 to 100")
        if hidden_dim is not None:
            check_positive_integer("hidden_dim", hidden_dim, "512")
        self.num_tokens = num_tokens
        self.hidden_dim = hidden_dim

    def accepts(self, layer):
        return (
            _attends(layer)
            or isinstance(layer, keras.layers.EinsumDense)
            or has_positions(layer)
            or is_backbone(layer)
            or generates(layer)
        )

    def default_targets(self, candidates):
        model = candidates.model
        layers = layer_tree.layers_by_path(model)
        found = [a for b in find_blocks(layers) for a in b.attention]
        attentions = [a for a in found if not a.cross]
        encodes = len(attentions) < len(found)
        if encodes:
            self._check_reads_text(model, layers)
        decodes = not encodes and any(map(_is_decoder, layers.values()))
        carriers = [
            path for a in attentions for path in _carriers(layers, a, decodes)
        ]
        if not carriers or None in carriers:
            kinds = {type(layers[a.path]).__name__ for a in attentions}
            raise ValueError(
                "PrefixTuning needs a text decoder of keras-hub, T5, or blocks "
                "that attend to their own sequence by "
                f"`keras.layers.MultiHeadAttention`. `{model.name}` is none "
                "of them. Most text models take PromptTuning. "
                f"Received: attention by {sorted(kinds) or 'no layer'}"
            )
        if decodes:
            return [*carriers, *text_paths(model, self)[1:]]
        places = [path for path, la in layers.items() if has_positions(la)]
        return [*carriers, *places]

    def _check_reads_text(self, model, layers):
        """Raises if another input than text has positions to be moved."""
        found = (text_objection(la, self.num_tokens) for la in layers.values())
        reason = next(filter(None, found), None)
        if reason is not None:
            raise ValueError(
                "PrefixTuning takes encoder-decoders that read text alone. "
                f"`{model.name}` does not fit: {reason}. Other methods, such "
                f"as LoRA, do. Received: {self!r}"
            )

    def objection(self, path, layer):
        if _carries(layer) and not _heads(layer):
            return "its keys and values have no heads of one size"
        if has_positions(layer) and self.num_tokens >= layer.sequence_length:
            return (
                f"num_tokens={self.num_tokens} leaves no room in its "
                f"{layer.sequence_length} positions"
            )
        return text_objection(layer, self.num_tokens)

    def all_shapes(self, layers):
        places = _places(layers)
        owner, *_ = places
        heads = {_heads(layers[path]) for path in places}
        if len(heads) > 1:
            raise ValueError(
                "PrefixTuning needs keys and values of one size in all layers. "
                f"Received: heads of {sorted(heads)}"
            )
        shapes = {path: {} for path in layers}
        shapes[owner] = self._shapes(places, *heads.pop())
        return shapes

    def _shapes(self, places, heads, size):
        depth = 1 + max(index for index, _ in places.values())
        last = (depth, 2, heads, size)
        if self.hidden_dim is None:
            return {"prefix": (self.num_tokens, *last)}
        units, hidden = heads * size, self.hidden_dim
        return {
            "prefix_inputs": (self.num_tokens, units),
            "dense_0_kernel": (units, hidden),
            "dense_0_bias": (hidden,),
            "dense_1_kernel": (hidden, *last),
            "dense_1_bias": last,
        }

    def create_all(self, layers, name):
        places, shapes = _places(layers), self.all_shapes(layers)
        decodes = any(map(is_backbone, layers.values()))
        # Any word holds the place of a key and a value.
        tokens = tokens_for(layers, [0] * self.num_tokens)
        created, owner = {}, None
        for path, layer in layers.items():
            if path in places:
                kind = _kind_for(layer, decodes)
                leaf = kind(layer, shapes[path], name, tokens)
                owner = owner or leaf
                leaf.take_from(owner, *places[path])
            elif has_positions(layer):
                leaf = PositionAdapter(layer, {}, name, tokens)
            else:
                leaf = passing_adapter(layer, name, tokens)
            created[path] = leaf
        return created


# -- Where prefixes go -------------------------------------------------------


def _computes_attention(layer):
    """Whether keys and values of all tokens meet in a method of `layer`."""
    kind = layer_tree.base_class(layer)
    call = getattr(kind.call, "__code__", None)
    if call is None or "_compute_attention" not in call.co_names:
        return False
    _, *names = inspect.signature(kind._compute_attention).parameters
    starts = ("q", "k", "v", "attention_mask")
    pairs = list(zip(names, starts, strict=False))
    return len(pairs) == 4 and all(n.startswith(start) for n, start in pairs)


def _adds_bias(layer):
    """Whether `layer` is T5's attention, which hands on a bias and a cache."""
    call = getattr(layer_tree.base_class(layer).call, "__code__", None)
    return call is not None and {"compute_bias", "key_projector"} <= {
        *call.co_names
    }


def _attends(layer):
    return _computes_attention(layer) or _adds_bias(layer)


def _carries(layer):
    return _attends(layer) or isinstance(layer, keras.layers.EinsumDense)


def _is_decoder(layer):
    """Whether `layer` is a backbone that some causal task stands on."""
    if not is_backbone(layer):
        return False
    import keras_hub

    kinds = [keras_hub.models.CausalLM]
    for kind in kinds:
        kinds += kind.__subclasses__()
    backbone = layer_tree.base_class(layer)
    return any(kind.backbone_cls is backbone for kind in kinds)


def _carriers(layers, attention, decodes):
    """Paths of what takes the prefix of one attention; `[None]` if nothing.

    A decoder's attention that has no step of its own for all keys and values
    takes it in their projections, before anything is done to them.
    """
    layer = layers[attention.path]
    own = isinstance(layer, keras.layers.MultiHeadAttention)
    rotates = any("rot" in path for path, _ in layer_tree.walk(layer))
    if _adds_bias(layer):
        return [attention.path]
    if not (own or decodes):
        return [None]
    if _computes_attention(layer):
        return [attention.path]
    if rotates or not decodes:
        return [None]
    return [attention.key, attention.value]


def _heads(layer):
    """`(heads, size)` of the keys and values of `layer`, or `None`."""
    if isinstance(layer, keras.layers.EinsumDense):
        found = {kernel_of(layer).free_shape}
    else:
        found = {
            _head_shape(layer, child, segment)
            for segment, child in layer_tree.children(layer)
            if {"key", "value", "k", "v", "qkv"} & set(segment.split("_"))
            and has_kernel(child)
        }
    shape = found.pop() if len(found) == 1 else ()
    return shape if len(shape) == 2 else None


def _head_shape(layer, child, segment):
    view = kernel_of(child)
    if not isinstance(view, EinsumKernel):  # Split into heads afterwards.
        size = getattr(layer, "head_dim", None) or layer.key_value_dim
        return view.outputs // size, size
    if "qkv" in segment.split("_"):
        *heads, size = view.free_shape
        return *heads, size // 3
    return view.free_shape


def _places(layers):
    """`{path: (layer's number, part)}`; a part is 0 for keys, 1 for values."""
    carriers = [path for path, layer in layers.items() if _carries(layer)]
    backbone = any(map(is_backbone, layers.values()))
    whole = [_attends(layers[path]) for path in carriers]
    if all(whole) and whole:
        return {path: (i, None) for i, path in enumerate(carriers)}
    if any(whole) or not backbone or not carriers:
        raise ValueError(
            "PrefixTuning finds its layers itself: all attentions of a model, "
            "and what the prefix passes through. Leave `targets` out. "
            f"Received: targets={list(layers)}"
        )
    return {path: divmod(i, 2) for i, path in enumerate(carriers)}


def _kind_for(layer, decodes):
    if _adds_bias(layer):
        return BiasedAttentionAdapter
    if not _computes_attention(layer):
        return ProjectionAdapter
    return CausalAttentionAdapter if decodes else AttentionAdapter
