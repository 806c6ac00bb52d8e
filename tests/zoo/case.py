"""What a tiny model of keras-hub is, and what is known of it."""

import dataclasses
import warnings
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_peft.export import samples
from keras_peft.export.signature import read_signature

GROUPS = ("attention", "mlp", "all-linear", "embeddings", "convolutions")


@dataclasses.dataclass(frozen=True)
class Case:
    """One class of keras-hub.

    Attributes:
        name: Name of the class in `keras_hub.models`; in brackets, what it is
            given beside.
        make: Builds the model; every weight may come from the global seed.
        attention: Layers that the target group of that name must find, counted
            from the architecture: projections of queries, keys, values and
            outputs, or what stands for them.
        mlp: Likewise, linear layers of feed-forward parts, banks of experts
            included.
        linear: All linear layers outside of the head. `None` is `attention`
            and `mlp` together.
        embeddings: Tables of tokens, positions or segments.
        convolutions: Convolutions, depthwise ones too.
        default: Groups that are adapted when the user names none.
        idle: Regular expressions over the paths of layers whose adapter gets
            no gradient by the architecture, with the reason beside them: such
            as the last block's part that no output depends on.
        inputs: Makes a batch of a number of rows; made up from the signature
            by default.
        prompt: Makes what a language model completes from a batch; the batch
            itself by default, with the places to fill masked.
        labels: Makes targets for `fit` from the model and its inputs; by
            default numbers in the structure of the outputs.
        weights: Makes weights of samples from the inputs, where a task cannot
            be trained without.
        unable: `{column: reason}` where keras-hub itself cannot run, or cannot
            run on a backend (`"train on jax"`), or nothing there (`"torch"`).
    """

    name: str
    make: Callable[[], keras.Model]
    attention: int = 0
    mlp: int = 0
    linear: int | None = None
    embeddings: int = 0
    convolutions: int = 0
    default: tuple[str, ...] = ("attention", "mlp")
    idle: Mapping[str, str] = dataclasses.field(default_factory=dict)
    inputs: Callable[[keras.Model, int], Any] | None = None
    prompt: Callable[[Any], Any] | None = None
    labels: Callable[[keras.Model, Any], Any] | None = None
    weights: Callable[[Any], Any] | None = None
    unable: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Name of the class."""
        return self.name.partition(" ")[0]

    @property
    def counts(self) -> dict[str, int]:
        """Layers by target group."""
        linear = self.attention + self.mlp
        linear = linear if self.linear is None else self.linear
        blocks = (self.attention, self.mlp, linear)
        found = (*blocks, self.embeddings, self.convolutions)
        return dict(zip(GROUPS, found, strict=True))

    def build(self, seed: int = 0) -> keras.Model:
        """The model; one seed gives the same weights on one backend."""
        keras.utils.set_random_seed(seed)
        with warnings.catch_warnings():
            # T5's attention says that it takes no implicit masks.
            warnings.simplefilter("ignore", UserWarning)
            model = self.make()
        _move_constants(model, seed)
        return model

    def batch(self, model: keras.Model, rows: int = 3) -> Any:
        """Inputs as the model is called with them."""
        if self.inputs is not None:
            return self.inputs(model, rows)
        signature = read_signature(model)
        sizes = samples.trace_sizes(model, signature) | {"batch": rows}
        tensors = samples.make_batch(model, signature, sizes, seed=1)
        return keras.tree.map_structure(
            tensors.__getitem__, signature.structure
        )

    def targets(self, model: keras.Model, batch: Any) -> Any:
        """What to train the outputs for a batch towards."""
        if self.labels is not None:
            return self.labels(model, batch)
        rng = np.random.default_rng(2)
        rows = len(keras.tree.flatten(batch)[0])

        def like(output):
            # An output that is the same for all rows has but one.
            shape = (rows, *output.shape[1:])
            return rng.normal(size=shape).astype("float32")

        return keras.tree.map_structure(like, model(batch, training=False))


def backbone(name: str, settings: Mapping[str, Any], **known: Any) -> Case:
    """A case of a backbone that numbers and strings describe.

    Args:
        name: Its class in `keras_hub.models`.
        settings: Arguments of the class.
        **known: Fields of `Case`.
    """

    def make():
        import keras_hub

        return getattr(keras_hub.models, name)(**settings)

    return Case(name, make, **known)


def task(
    name: str, base: Case, known: Mapping[str, Any], **settings: Any
) -> Case:
    """A case of a task on a backbone, whose layers are those of the backbone.

    Args:
        name: Its class in `keras_hub.models`.
        base: The backbone's case.
        known: Fields of `Case` that differ from the backbone's.
        **settings: Arguments of the class beside `backbone`, and beside
            `preprocessor`, which is none.
    """

    def make():
        import keras_hub

        kind = getattr(keras_hub.models, name)
        return kind(backbone=base.make(), preprocessor=None, **settings)

    return dataclasses.replace(base, name=name, make=make, **known)


def _move_constants(model, seed):
    """Moves weights that are all zero or one, so that each one counts."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        value = keras.ops.convert_to_numpy(weight)
        if value.dtype.kind == "f" and np.all(value == value.flat[0]):
            noise = rng.uniform(0.05, 0.3, value.shape)
            weight.assign(value + noise.astype(value.dtype))
