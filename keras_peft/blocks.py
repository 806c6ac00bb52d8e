"""The parts of transformer blocks: which layer has which role.

Roles are read off shapes and einsum equations, and off names only where
shapes cannot tell: a query and a key may look alike.
"""

import dataclasses
from collections.abc import Iterable
from collections.abc import Mapping

import keras

from keras_peft import layer_tree
from keras_peft.kernels import EinsumKernel
from keras_peft.kernels import has_kernel
from keras_peft.kernels import kernel_of
from keras_peft.patterns import lies_in

# Words of layer names that tell the projections of an attention apart.
_WORDS = {
    "query": {"query", "q"},
    "key": {"key", "k"},
    "value": {"value", "v"},
    "fused": {"qkv"},
    "output": {"output", "out", "o"},
}


@dataclasses.dataclass(frozen=True)
class Attention:
    """One attention of a block, with the paths of its projections.

    Attributes:
        path: Path of the layer that holds them.
        query, key, value: Their paths, `None` where one layer computes all.
        fused: Path of that layer, or `None`.
        output: Path of the projection back to the hidden size.
        cross: Whether it attends to another sequence.
    """

    path: str
    query: str | None
    key: str | None
    value: str | None
    fused: str | None
    output: str | None

    @property
    def cross(self) -> bool:
        return "cross" in self.path.rpartition(".")[2]


@dataclasses.dataclass(frozen=True)
class Block:
    """A transformer block: one or more attentions, and a feed-forward part.

    Attributes:
        path: Path of the block.
        hidden: Its hidden size.
        attention: Its attentions, self before cross.
        feed_forward_inputs: Paths of the layers that the feed-forward part
            begins with: one, or two with a gate. Empty if there is none.
        feed_forward_output: Path of the layer that it ends with. `None` if
            it is a bank of experts, which has no layer of its own.
    """

    path: str
    hidden: int
    attention: tuple[Attention, ...]
    feed_forward_inputs: tuple[str, ...]
    feed_forward_output: str | None

    @property
    def paths(self) -> list[str | None]:
        return [self.path]

    @property
    def keys(self) -> list[str | None]:
        return [attention.key for attention in self.attention]

    @property
    def values(self) -> list[str | None]:
        return [attention.value for attention in self.attention]

    @property
    def attention_outputs(self) -> list[str | None]:
        return [attention.output for attention in self.attention]

    @property
    def feed_forward_outputs(self) -> list[str | None]:
        return [self.feed_forward_output]


def attention_paths(layers: Mapping[str, keras.Layer]) -> list[str]:
    """Paths of the layers that hold the projections of an attention."""
    named = [path for path, layer in layers.items() if _attends(path, layer)]
    inner = [
        path
        for path in named
        if not any(other.startswith(path + ".") for other in named)
    ]
    whole = (_with_outputs(layers, path, named) for path in inner)
    return list(dict.fromkeys(whole))


def _with_outputs(layers, path, named):
    """The attention around one whose outputs that projects, or itself."""
    around = path.rpartition(".")[0]
    if around not in named:
        return path
    beside = [p for p in _linear(layers, around) if not lies_in(p, [path])]
    return around if len(beside) == 1 else path


def _attends(path, layer):
    name = layer_tree.base_class(layer).__name__.lower()
    return (
        "attention" in name
        and "norm" not in name
        and any(layer_tree.children(layer))
    )


def find_blocks(layers: Mapping[str, keras.Layer]) -> list[Block]:
    """The transformer blocks among `{path: layer}`, in the model's order."""
    attentions = attention_paths(layers)
    matrices = [
        path
        for path, layer in layers.items()
        if not lies_in(path, attentions)
        and any(len(v.shape) > 1 for v in layer_tree.own_variables(layer))
    ]
    held: dict[str, list[str]] = {}
    for path in attentions:
        block = _block_around(path, layers, matrices)
        if block is not None:
            held.setdefault(block, []).append(path)
    blocks = [_block(layers, path, inside) for path, inside in held.items()]
    return [block for block in blocks if block is not None]


def block_of(layer: keras.Layer) -> Block | None:
    """The `Block` that `layer` is, its paths beginning with `block`."""
    if isinstance(layer, keras.Model) or not layer.built:
        return None
    below = {f"block.{path}": la for path, la in layer_tree.walk(layer)}
    found = find_blocks({"block": layer, **below})
    return next((block for block in found if block.path == "block"), None)


def _block_around(path, layers, matrices):
    """The nearest layer around an attention that holds other matrices too.

    That leaves out wrappers of an attention alone. A model is no block, and
    pooling by attention is none either: it ends the sequence.
    """
    while "." in path:
        path = path.rpartition(".")[0]
        layer = layers.get(path)  # A list has a segment, but is no layer.
        if isinstance(layer, keras.Model):
            return None
        if layer is not None and any(lies_in(m, [path]) for m in matrices):
            name = layer_tree.base_class(layer).__name__.lower()
            return None if "pool" in name else path
    return None


def _block(layers, path, attentions):
    inside = {p: la for p, la in layers.items() if lies_in(p, [path])}
    projections = {a: _linear(inside, a) for a in attentions}
    first = next((views for views in projections.values() if views), None)
    if first is None:
        return None
    hidden = next(iter(first.values())).inputs
    others = {
        p: view
        for p, view in _linear(inside, path).items()
        if not lies_in(p, attentions)
    }
    if any(_is_bank(layer, hidden) for layer in inside.values()):
        others = {}
    return Block(
        path,
        hidden,
        tuple(_attention(a, views, hidden) for a, views in projections.items()),
        *_feed_forward(others, hidden),
    )


def _linear(layers, path):
    """`{path: kernel}` of the linear layers below `path`."""
    kinds = (keras.layers.Dense, keras.layers.EinsumDense)
    return {
        p: kernel_of(layer)
        for p, layer in layers.items()
        if lies_in(p, [path])
        and isinstance(layer, kinds)
        and layer.built
        and has_kernel(layer)
    }


def _attention(path, views, hidden):
    roles = dict.fromkeys(_WORDS)
    for role, words in _WORDS.items():
        named = [p for p in views if words & _words_of(p)]
        if role == "output":
            rest = [p for p in views if p not in roles.values()]
            fits = [p for p in rest if _one_axis_of(views[p], hidden)]
            named = fits if len(fits) == 1 else [p for p in named if p in fits]
        roles[role] = next(iter(named), None)
    return Attention(path, **roles)


def _words_of(path):
    return set(path.rpartition(".")[2].split("_"))


def _one_axis_of(view, size):
    """Whether outputs are vectors of that size, not split into heads."""
    split = isinstance(view, EinsumKernel) and len(view.free) > 1
    return view.outputs == size and not split


def _feed_forward(views, hidden):
    """`(paths of the input layers, path of the output layer)`."""
    ends = [p for p, view in views.items() if _one_axis_of(view, hidden)]
    # Low-rank side branches have smaller inputs.
    width = max((views[p].inputs for p in ends), default=0)
    ends = [p for p in ends if views[p].inputs == width]
    if not ends or (len(ends) > 1 and width != hidden):
        return (), None
    # Where all sizes are equal, the last layer is the output.
    output = ends[-1]
    inputs = tuple(
        p
        for p, view in views.items()
        # A gate may lie in the same kernel, side by side.
        if p != output
        and view.inputs == hidden
        and view.outputs in (width, 2 * width)
    )
    return (inputs, output) if inputs else ((), None)


def _is_bank(layer, hidden):
    """Whether a layer holds one matrix per expert, in one raw weight."""
    if isinstance(layer, keras.layers.EinsumDense):
        return layer.built and not has_kernel(layer)
    if has_kernel(layer):
        return False
    shapes = [v.shape for v in layer_tree.own_variables(layer)]
    return any(
        len(shape) == 3 and hidden in shape[1:] and min(shape[1:]) > 1
        for shape in shapes
    )


def require(blocks: Iterable[Block], role: str) -> list[str]:
    """Paths of one role in every block; raises if a block has none.

    `role` is the name of one of the lists of `Block`, as in
    `require(blocks, "feed_forward_outputs")`.
    """
    found = {block.path: getattr(block, role) for block in blocks}
    missing = [p for p, paths in found.items() if None in paths or not paths]
    words = role.replace("_", " ")
    if not found:
        raise ValueError(
            "The model has no transformer blocks, that is, layers that hold "
            f"an attention and a feed-forward part, so it has no {words}. "
            "Name layers with `targets`. Received: no blocks"
        )
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(found)} transformer blocks have no layer "
            f"that is one of the {words}: a bank of experts, or a layer for "
            "query, key and value at once, has none. Name layers with "
            f"`targets`, or choose another method. Received: {missing[:3]}"
            f"{'...' if len(missing) > 3 else ''}"
        )
    return [path for paths in found.values() for path in paths]
