"""What the settings of every method have in common."""

import inspect

from keras_peft.calibration import LayerInputs
from keras_peft.kernels import has_kernel


class Method:
    """Settings of an adaptation method.

    A subclass is a plain object: its constructor's keyword arguments are its
    attributes and its config. It says which layers it can sit on (`accepts`)
    and which it takes by default (`default_targets`), reports what speaks
    against one of them (`objection`), names the weights that it adds to it
    (`shapes`) and creates the adapter for it (`create`).
    """

    # Whether start values depend on what the layers' inputs look like, and
    # what is kept of these.
    calibrated = False
    observes: type = LayerInputs

    def __init__(self):
        """Most methods have settings; these have none."""

    @property
    def patterns(self):
        """Patterns over layer paths that must each match an adapted layer."""
        return ()

    def accepts(self, layer):
        """Whether a built layer is of a kind that the method can adapt."""
        return has_kernel(layer)

    def default_targets(self, candidates):
        """Paths of what is adapted where the user names no targets."""
        return candidates.default()

    def for_layers(self, candidates, paths):
        """These settings, with what they leave open chosen for the model.

        Called once, by `adapt`, for the paths that will carry the adapter.
        """
        return self

    def objection(self, path, layer):
        """Why the layer at `path` cannot take this method, or `None`."""

    def shapes(self, path, layer):
        """`{weight: shape}` of what an adapter file keeps for one layer."""
        raise NotImplementedError

    def create(self, path, layer, name):
        """The adapter for `layer`, its start values not yet set."""
        raise NotImplementedError

    def all_shapes(self, layers):
        """`{path: shapes}` of all layers of one adapter, given by path."""
        return {path: self.shapes(path, la) for path, la in layers.items()}

    def create_all(self, layers, name):
        """`{path: adapter}` for all of them: what they share is made here."""
        return {
            path: self.create(path, la, name) for path, la in layers.items()
        }

    def get_config(self):
        arguments = inspect.signature(type(self).__init__).parameters
        return {k: getattr(self, k) for k in arguments if k != "self"}

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def __eq__(self, other):
        return type(self) is type(other) and (
            self.get_config() == other.get_config()
        )

    def __hash__(self):
        return hash(type(self))

    def __repr__(self):
        settings = ", ".join(f"{k}={v!r}" for k, v in self.get_config().items())
        return f"{type(self).__name__}({settings})"
