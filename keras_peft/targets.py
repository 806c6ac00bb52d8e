"""Which layers a method adapts."""

import math
from collections.abc import Callable
from collections.abc import Sequence

import keras

from keras_peft import adapter_state
from keras_peft import layer_tree
from keras_peft.blocks import attention_paths
from keras_peft.kernels import has_kernel
from keras_peft.kernels import kernel_of
from keras_peft.patterns import check_pattern
from keras_peft.patterns import lies_in
from keras_peft.patterns import nearest
from keras_peft.patterns import path_matches

_LINEAR = (keras.layers.Dense, keras.layers.EinsumDense)
_CONVOLUTIONS = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
)
GROUPS = ("attention", "mlp", "all-linear", "embeddings", "convolutions")


class Candidates:
    """The layers of a model that can be adapted, by path and by group.

    Args:
        model: A built model.
        head: Paths of the layers that belong to no group.
        accepts: Tells of a built layer whether it can be adapted.
    """

    def __init__(
        self,
        model: keras.Layer,
        head: Sequence[str],
        accepts: Callable[[keras.Layer], bool] = has_kernel,
    ):
        self.model = model
        self.layers = dict(layer_tree.walk(model))
        self.adaptable = {
            path: layer
            for path, layer in self.layers.items()
            if layer.built and accepts(layer)
        }
        self.head = list(head)
        attention = attention_paths(self.layers)
        self.attention = tuple(path + "." for path in attention)
        self.blocks = tuple(
            path + "."
            for path, layer in self.layers.items()
            if not isinstance(layer, keras.Model)
            and any(a.startswith(path + ".") for a in attention)
        )

    def group(self, name: str) -> list[str]:
        """Paths of a target group; heads belong to none."""
        return [
            path
            for path, layer in self.adaptable.items()
            if self._in_group(name, path, layer)
            and not lies_in(path, self.head)
        ]

    def _in_group(self, name, path, layer):
        if name == "embeddings":
            return isinstance(layer, keras.layers.Embedding)
        if name == "convolutions":
            return isinstance(layer, _CONVOLUTIONS)
        if not isinstance(layer, _LINEAR):
            return False
        attends = path.startswith(self.attention)
        if name == "attention":
            return attends
        if name == "mlp":
            return path.startswith(self.blocks) and not attends
        return True

    def matching(self, target: str) -> list[str]:
        """Paths of the layers that one target names."""
        if target in GROUPS:
            return self.group(target)
        check_pattern(target)
        return [
            path
            for path, layer in self.adaptable.items()
            if layer.name == target or path_matches(target, path)
        ]

    def default(self) -> list[str]:
        """The linear layers of transformer blocks, feed-forward ones too.

        That is what matches full fine-tuning
        ([LoRA Without Regret](https://thinkingmachines.ai/blog/lora/)). A
        model without blocks gives all its linear layers, and one whose
        convolutions hold more weights than those gives its convolutions too.
        """
        linear = self.group("attention") + self.group("mlp")
        linear = linear or self.group("all-linear")
        convolutions = self.group("convolutions")
        if self._size(convolutions) <= self._size(linear):
            convolutions = []
        chosen = {*linear, *convolutions}
        return [path for path in self.adaptable if path in chosen]

    def _size(self, paths):
        shapes = [kernel_of(self.layers[path]).variable.shape for path in paths]
        return sum(math.prod(shape) for shape in shapes)

    def names(self) -> dict[str, int]:
        """`{name: count}` of the layers that could be named."""
        counts: dict[str, int] = {}
        for layer in self.adaptable.values():
            counts[layer.name] = counts.get(layer.name, 0) + 1
        return counts


def select(candidates: Candidates, targets: str | Sequence[str]) -> list[str]:
    """Paths of the layers that `targets` name, in the model's order.

    Raises:
        ValueError: if a target names no layer, with what exists.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    matches = {target: candidates.matching(target) for target in targets}
    unmatched = [target for target, paths in matches.items() if not paths]
    if unmatched or not targets:
        raise ValueError(no_match(candidates, unmatched, targets))
    chosen = {path for paths in matches.values() for path in paths}
    return [path for path in candidates.adaptable if path in chosen]


def no_match(candidates, unmatched, targets, argument="targets"):
    """The message for targets that match nothing: what exists, what is near."""
    names = candidates.names()
    listed = ", ".join(
        f"{name!r} (x{count})" if count > 1 else repr(name)
        for name, count in names.items()
    )
    groups = [group for group in GROUPS if candidates.group(group)]
    missing = ", ".join(map(repr, unmatched)) or "an empty list"
    missing = f"matches {missing}"
    if targets is None:
        missing = "is one that the method adapts by default"
    near = nearest(unmatched[0], [*names, *groups]) if unmatched else ""
    return (
        f"No layer of `{candidates.model.name}` {missing}.{near} "
        f"Layers that can be adapted: {listed or 'none'}. Groups: "
        f"{', '.join(map(repr, groups)) or 'none'}. "
        f"Received: {argument}={targets}"
    )


def find_head(model: keras.Layer) -> list[str]:
    """Paths of what stands outside the base of `model`.

    The base is `model.backbone`, or else the only model among its layers: a
    backbone with a classifier on top. A model without either has no head.
    """
    children = list(layer_tree.children(model))
    base = getattr(model, "backbone", None)
    if base is None:
        models = [la for _, la in children if isinstance(la, keras.Model)]
        base = models[0] if len(models) == 1 else None
    if base is None or base is model:
        return []
    inside = {id(base), *(id(layer) for _, layer in layer_tree.walk(base))}
    return [
        path
        for path, layer in children
        if id(layer) not in inside
        and adapter_state.variables_below({path: layer}, [path])
    ]
