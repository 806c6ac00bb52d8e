"""Weights that all adapters of one method in a model share."""

import weakref


class Sharing:
    """Mixed into a method whose adapters share weights.

    The first adapter owns them, so that they are tracked, saved and filed
    once; the others find them by `owner()`.
    """

    def shared_shapes(self, layers):
        """`{weight: shape}` of what the adapters of `layers` share."""
        raise NotImplementedError

    def create_with(self, layer, shapes, name):
        """The adapter for `layer`, with weights of those shapes."""
        raise NotImplementedError

    def all_shapes(self, layers):
        found = super().all_shapes(layers)
        found[next(iter(layers))] |= self.shared_shapes(layers)
        return found

    def create(self, path, layer, name):
        return self.create_all({path: layer}, name)[path]

    def create_all(self, layers, name):
        shapes = self.all_shapes(layers)
        adapters = {
            path: self.create_with(layer, shapes[path], name)
            for path, layer in layers.items()
        }
        owner = next(iter(adapters.values()))
        for adapter in adapters.values():
            # A reference that Keras does not follow: it would save what is
            # shared with each layer.
            object.__setattr__(adapter, "owner", weakref.ref(owner))
        return adapters
