"""What a model keeps while it is adapted, and how to read it."""

import dataclasses

import keras

from keras_peft import layer_tree
from keras_peft.methods.method import Method
from keras_peft.patterns import lies_in


@dataclasses.dataclass
class NamedAdapter:
    """One adapter of a model: a method, and the layers that carry it."""

    method: Method
    paths: list[str]
    trainable: bool = True


class AdapterState:
    """The adapters of a model, and what is needed to take them off again.

    Attributes:
        adapters: `{name: NamedAdapter}`, in the order they were added.
        active: `{name: strength}` of those that take part.
        head: Paths of the layers outside the base, which train in full.
        heads: `{name: [array, ...]}`, the head's values per adapter. The live
            values belong to `head_of`; `None` stands for the base's own.
        rows: Whether each row of a batch has an adapter of its own.
        batch_norms: Batch normalization that was frozen.
        head_norms: Batch normalization that trains with the head.
    """

    def __init__(self, head):
        self.adapters = {}
        self.active = {}
        self.head = list(head)
        self.heads = {}
        self.head_of = None
        self.rows = False
        self.thawed = []
        self.head_thawed = []
        self.batch_norms = []
        self.head_norms = []


def is_adapted(model):
    """Whether `model` itself was adapted."""
    return isinstance(getattr(model, "peft", None), AdapterState)


def state_of(model):
    """The `AdapterState` of `model`; raises if it has none."""
    if is_adapted(model):
        return model.peft
    is_layer = isinstance(model, keras.Layer)
    for path, layer in layer_tree.walk(model) if is_layer else ():
        if is_adapted(layer):
            raise ValueError(
                f"`{model.name}` was not adapted itself: its layer `{path}` "
                f"was. Pass that layer. Received: model={model.name!r}"
            )
        if layer_tree.is_adapted(layer):
            raise ValueError(
                f"`{model.name}` was not adapted as a whole: its layer "
                f"`{path}` was wrapped by hand, and stays so. Use "
                "`keras_peft.adapt` instead of `keras_peft.layers` to merge, "
                f"switch or save adapters. Received: model={model.name!r}"
            )
    raise ValueError(
        f"`{getattr(model, 'name', model)}` has no adapters. Add one with "
        "`keras_peft.adapt(model, keras_peft.LoRA(rank=8))`. "
        f"Received: {type(model).__name__}"
    )


def named(model, name):
    """The `NamedAdapter` called `name`; raises if there is none."""
    adapters = state_of(model).adapters
    if name not in adapters:
        raise ValueError(
            f"The model has no adapter of that name. Its adapters: "
            f"{', '.join(map(repr, adapters))}. Received: name={name!r}"
        )
    return adapters[name]


def leaves(model, name):
    """`{path: adapter}` of the adapter called `name`."""
    paths = named(model, name).paths
    layers = layer_tree.layers_by_path(model)
    return {path: layers[path].adapters[name] for path in paths}


def head_variables(model):
    """`{"path/0.kernel": variable}` of the head, its state included."""
    layers = dict(layer_tree.walk(model))
    return variables_below(layers, state_of(model).head)


def variables_below(layers, paths):
    """The same for any paths, without the states of random generators.

    A layer that the head shares with the base, as a masked language model's
    does the table of tokens, belongs to the base.
    """
    elsewhere = {
        id(variable)
        for path, layer in layers.items()
        if not lies_in(path, paths)
        for variable in _held(layer)
    }
    return {
        f"{path}/{index}.{variable.name}": variable
        for path in paths
        for index, variable in enumerate(
            v for v in layers[path].variables if id(v) not in elsewhere
        )
        if not layer_tree.is_generator(variable)
    }


def _held(layer):
    """What a layer holds itself, and its adapters."""
    yield from layer_tree.own_variables(layer)
    if layer_tree.is_adapted(layer):
        for adapter in layer.adapters.values():
            yield from adapter.variables


def head_values(model, name):
    """`{key: array}` of the head that belongs to the adapter `name`."""
    state, variables = model.peft, head_variables(model)
    if state.head_of == name:
        return dict(zip(variables, read(variables), strict=True))
    return dict(zip(variables, state.heads[name], strict=True))


def set_head_values(model, name, values):
    """Gives the adapter `name` its head; live only while it is active."""
    variables = head_variables(model)
    model.peft.heads[name] = [values[key] for key in variables]
    if model.peft.head_of == name:
        for key, variable in variables.items():
            variable.assign(values[key])


def read(variables):
    """The values of a dict of variables, as NumPy arrays."""
    return [keras.ops.convert_to_numpy(v) for v in variables.values()]
