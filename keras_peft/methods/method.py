"""What the settings of every method have in common."""

import inspect


class Method:
    """Settings of an adaptation method.

    A subclass is a plain object: its constructor's keyword arguments are its
    attributes and its config. It reports what speaks against a layer
    (`objection`), names the weights that it adds to one (`shapes`) and creates
    the adapter for it (`create`).
    """

    def objection(self, path, kernel):
        """Why the layer at `path` cannot take this method, or `None`."""

    def shapes(self, path, kernel):
        """`{weight: shape}` of what an adapter file keeps for one layer."""
        raise NotImplementedError

    def create(self, path, layer, name):
        """The adapter for `layer`, its start values not yet set."""
        raise NotImplementedError

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
