"""Visual prompt tuning: learned tokens beside the patches of an image."""

import math

import keras
from keras import ops

from keras_peft import layer_tree
from keras_peft.blocks import attention_paths
from keras_peft.blocks import find_blocks
from keras_peft.methods.method import Method
from keras_peft.methods.settings import check_positive_integer
from keras_peft.methods.token_adapters import TokenAdapter
from keras_peft.methods.virtual_tokens import only_backbone


@keras.saving.register_keras_serializable(package="keras_peft")
class VisualPromptTuning(Method):
    """Visual prompt tuning: `num_tokens` learned tokens beside the patches.

    - Shallow: `encoder([P; x])`, with `P` of shape `(num_tokens, hidden)`. Its
      tokens pass through all blocks, and are cut off behind the last one.
    - `deep=True`: `x_i = block_i([P_i; x_{i-1}])`. Every block has tokens of
      its own, cut off behind it.

    Class token and patches keep their places and positions, so whatever pools
    them sees what it always saw. Trainable parameters: `num_tokens * hidden`,
    deep `num_tokens * hidden * blocks`. It cannot be merged.

    It fits the vision transformers of keras-hub whose blocks all see the same
    tokens (ViT, DeiT, DINOv2, DINOv3). Where no layer holds all of the
    blocks, as in CLIP and SigLIP, it has to be deep.

    - [Jia et al., 2022](https://arxiv.org/abs/2203.12119)

    Args:
        num_tokens: Positive integer; 5 to 100 is usual.
        deep: Boolean. Whether every block has tokens of its own.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
    >>> keras_peft.adapt(classifier, keras_peft.VisualPromptTuning(10))
    """

    def __init__(self, num_tokens=10, deep=False):
        check_positive_integer("num_tokens", num_tokens, "5 to 100")
        if not isinstance(deep, bool):
            raise ValueError(
                f"`deep` must be `True` or `False`. Received: deep={deep!r}"
            )
        self.num_tokens = num_tokens
        self.deep = deep

    def accepts(self, layer):
        below = dict(layer_tree.walk(layer))
        return not isinstance(layer, keras.Model) and bool(
            attention_paths(below)
        )

    def default_targets(self, candidates):
        at, backbone = only_backbone(candidates.model, self)
        images = [x for x in keras.tree.flatten(backbone.input) if x.ndim == 4]
        below = layer_tree.layers_by_path(backbone)
        blocks = find_blocks(below)
        if not images or len({block.hidden for block in blocks}) != 1:
            raise ValueError(
                "VisualPromptTuning needs a backbone that reads images by "
                "transformer blocks of one hidden size, such as "
                f"`keras_hub.models.ViTBackbone`. `{backbone.name}` is none. "
                f"Received: {layer_tree.base_class(backbone).__name__}"
            )
        paths = [block.path for block in blocks]
        if not self.deep:
            paths = [_around_all(below, paths, backbone)]
        return [f"{at}.{path}" if at else path for path in paths]

    def objection(self, path, layer):
        if _hidden(layer) is None:
            return "its hidden size cannot be read from its norms"
        return None

    def shapes(self, path, layer):
        return {"prompt": (self.num_tokens, _hidden(layer))}

    def create(self, path, layer, name):
        return VisualPromptAdapter(layer, self.shapes(path, layer), name)


def _around_all(layers, paths, backbone):
    """The path of the layer that holds all blocks and nothing around it."""
    holders = [
        holder
        for holder, layer in layers.items()
        if holder
        and not isinstance(layer, keras.Model)
        and all(path.startswith(holder + ".") for path in paths)
    ]
    if not holders:
        raise ValueError(
            f"No layer of `{backbone.name}` holds all its transformer blocks, "
            "so tokens cannot pass through all of them. Use "
            "`VisualPromptTuning(deep=True)`. Received: deep=False"
        )
    return max(holders, key=len)


def _hidden(layer):
    norms = (keras.layers.LayerNormalization, keras.layers.RMSNormalization)
    sizes = {
        below.gamma.shape
        for _, below in layer_tree.walk(layer)
        if isinstance(below, norms)
        and getattr(below, "gamma", None) is not None
    }
    shape = sizes.pop() if len(sizes) == 1 else ()
    return shape[0] if len(shape) == 1 else None


class VisualPromptAdapter(TokenAdapter):
    """The tokens, around an encoder or one of its blocks."""

    def initialize(self, rng):
        bound = math.sqrt(6 / sum(self.prompt.shape))
        value = rng.uniform(-bound, bound, size=self.prompt.shape)
        self.prompt.assign(value.astype("float32"))

    def around(self, call, inputs, *args, **kwargs):
        if not self.present:
            return call(inputs, *args, **kwargs)
        count = self.prompt.shape[0]
        if "num_prefix_tokens" in kwargs:  # Tokens that are not rotated.
            kwargs["num_prefix_tokens"] += count
        prompt = ops.cast(self.prompt, inputs.dtype)
        # In front, which is as good a place as any: attention has no order.
        prompt = ops.zeros_like(inputs[:, :1]) + prompt
        longer = ops.concatenate([prompt, inputs], axis=1)
        return keras.tree.map_structure(
            # What else a block returns, such as scores, is no sequence.
            lambda x: x[:, count:] if getattr(x, "ndim", 0) == 3 else x,
            call(longer, *args, **kwargs),
        )
