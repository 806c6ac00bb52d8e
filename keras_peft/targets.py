"""Which layers a method adapts."""

import math
from collections.abc import Callable
from collections.abc import Sequence

import keras

from keras_peft import adapter_state
from keras_peft import layer_tree
from keras_peft.kernels import has_kernel
from keras_peft.kernels import kernel_of
from keras_peft.patterns import check_pattern
from keras_peft.patterns import lies_in
from keras_peft.patterns import nearest
from keras_peft.patterns import path_matches
from keras_peft.raw_kernels import experts
from keras_peft.raw_kernels import is_recurrent
from keras_peft.raw_kernels import multiplies_raw
from keras_peft.raw_kernels import raw_kernels
from keras_peft.roles import LINEAR
from keras_peft.roles import Roles

_CONVOLUTIONS = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
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
        recurrent = [
            p + "." for p, la in self.layers.items() if is_recurrent(la)
        ]
        self.adaptable = {
            path: layer
            for path, layer in self.layers.items()
            if layer.built
            and accepts(layer)
            # The recurrent layer around a cell stands for its weights.
            and not (path.startswith(tuple(recurrent)) and raw_kernels(layer))
        }
        self.head = list(head)
        self.roles = Roles(self.layers)
        self.routers = _routers(self.layers)

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
        if not isinstance(layer, LINEAR) and not multiplies_raw(layer):
            return False
        if path in self.routers:
            return False
        if name == "attention":
            return self.roles.attends(path)
        if name == "mlp":
            return self.roles.feeds_forward(path)
        return True

    def matching(self, target: str) -> list[str]:
        """Paths of the layers that one target names."""
        if target in GROUPS and (group := self.group(target)):
            return group
        check_pattern(target)
        return [
            path
            for path, layer in self.adaptable.items()
            if layer.name == target or path_matches(target, path)
        ]

    def default(self) -> list[str]:
        """The linear layers of transformer blocks, feed-forward ones too.

        Banks of experts are of the feed-forward part; their routers, which
        choose among them, are left out.

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
        return sum(_size(self.layers[path]) for path in paths)

    def names(self) -> dict[str, int]:
        """`{name: count}` of the layers that could be named."""
        counts: dict[str, int] = {}
        for layer in self.adaptable.values():
            counts[layer.name] = counts.get(layer.name, 0) + 1
        return counts


def _routers(layers):
    """Paths of what scores the experts beside it, or weighs a shared one."""
    found = set()
    for bank, layer in layers.items():
        count = experts(layer) if layer.built else 0
        if not count:
            continue
        around = bank.rpartition(".")[0]
        found |= {
            path
            for path, other in layers.items()
            if lies_in(path, [around])
            and isinstance(other, LINEAR)
            and has_kernel(other)
            and kernel_of(other).outputs in (count, 1)
        }
    return found


def _size(layer):
    kernels = raw_kernels(layer) or [kernel_of(layer)]
    return sum(math.prod(kernel.variable.shape) for kernel in kernels)


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
    backbone with a classifier on top. A model without either has no head, and
    neither has a backbone of keras-hub, whatever models it is made of.
    """
    if any(kind.__name__ == "Backbone" for kind in type(model).__mro__):
        return []
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
