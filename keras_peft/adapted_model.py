"""What a model keeps while it is adapted, and how it is saved then."""

import dataclasses

import keras

from keras_peft import layer_tree
from keras_peft.methods.method import Method


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
    """

    def __init__(self, head):
        self.adapters = {}
        self.active = {}
        self.head = list(head)
        self.heads = {}
        self.head_of = None
        self.thawed = []
        self.head_thawed = []
        self.batch_norms = []


class AdaptedModel:
    """Mixed into the class of a model that was adapted.

    Keras saves such a model as its base and the adapters' settings, and puts
    the adapters back in before it loads the weights.
    """

    def get_config(self):
        state = self.peft
        if len(state.adapters) > 1 and state.head:
            raise ValueError(
                "A model file holds one head, but this model has one per "
                "adapter. Save each with `keras_peft.save_adapter()`, or "
                "`keras_peft.remove(model, name)` all but one first. "
                f"Received: adapters={list(state.adapters)}, head={state.head}"
            )
        with layer_tree.plain(self):
            base = keras.saving.serialize_keras_object(self)
        base.pop("compile_config", None)
        adapters = {
            name: {
                "method": keras.saving.serialize_keras_object(adapter.method),
                "paths": adapter.paths,
                "trainable": adapter.trainable,
            }
            for name, adapter in state.adapters.items()
        }
        return {
            "base": base,
            "adapters": adapters,
            "active": state.active,
            "head": state.head,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        load = keras.saving.deserialize_keras_object
        model = load(config["base"], custom_objects=custom_objects)
        for name, adapter in config["adapters"].items():
            install(
                model,
                name,
                NamedAdapter(
                    load(adapter["method"]),
                    adapter["paths"],
                    adapter["trainable"],
                ),
                config["head"],
            )
        activate(model, config["active"])
        return model

    # A property: Keras puts a `quantize` of its own on every instance.
    @property
    def quantize(self):
        return self._refuse_quantize

    def _refuse_quantize(self, *args, **kwargs):
        raise ValueError(_not_while_adapted("quantized", self))

    def save_to_preset(self, *args, **kwargs):
        raise ValueError(_not_while_adapted("saved as a preset", self))

    def enable_lora(self, *args, **kwargs):
        raise ValueError(_not_while_adapted("given Keras' own LoRA", self))


# The name under which Keras writes and finds an adapted model of any class.
_SAVED_AS = "keras_peft>AdaptedModel"
keras.saving.register_keras_serializable("keras_peft")(AdaptedModel)


def _not_while_adapted(done, model):
    return (
        f"An adapted model cannot be {done}: its adapters would be lost. Call "
        "`keras_peft.merge(model)` or `keras_peft.remove(model)` first. "
        f"Received: adapters={list(model.peft.adapters)}"
    )


def is_adapted(model):
    """Whether `model` itself was adapted."""
    return isinstance(model, AdaptedModel)


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
    layers = dict(layer_tree.walk(model))
    return {path: layers[path].adapters[name] for path in paths}


def head_variables(model):
    """`{"path/0.kernel": variable}` of the head, its state included."""
    layers = dict(layer_tree.walk(model))
    return variables_below(layers, state_of(model).head)


def variables_below(layers, paths):
    """The same for any paths, without the states of random generators."""
    return {
        f"{path}/{index}.{variable.name}": variable
        for path in paths
        for index, variable in enumerate(layers[path].variables)
        if not _is_generator(variable)
    }


def own_variables(layer):
    """What a layer holds itself, without the states of random generators."""
    variables = layer._trainable_variables + layer._non_trainable_variables
    return [v for v in variables if not _is_generator(v)]


def _is_generator(variable):
    return "seed_generator" in variable.path


def head_values(model, name):
    """`{key: array}` of the head that belongs to the adapter `name`."""
    state, variables = model.peft, head_variables(model)
    if state.head_of == name:
        return dict(zip(variables, _read(variables), strict=True))
    return dict(zip(variables, state.heads[name], strict=True))


def set_head_values(model, name, values):
    """Gives the adapter `name` its head; live only while it is active."""
    variables = head_variables(model)
    model.peft.heads[name] = [values[key] for key in variables]
    if model.peft.head_of == name:
        for key, variable in variables.items():
            variable.assign(values[key])


# -- Putting adapters in and out ---------------------------------------------


def install(model, name, adapter, head, initialize=False):
    """Creates the adapter's layers, attaches them, freezes the base.

    All that can fail is done before the first layer is touched.
    """
    layers = dict(layer_tree.walk(model))
    created = []
    for path in adapter.paths:
        leaf = adapter.method.create(path, layers[path], name)
        leaf.start() if initialize else leaf.read_base()
        created.append(leaf)
    if not is_adapted(model):
        _become_adapted(model, head)
    for path, leaf in zip(adapter.paths, created, strict=True):
        layer_tree.attach(layers[path], name, leaf)
    state = model.peft
    state.adapters[name] = adapter
    state.heads[name] = state.heads[None]


def _become_adapted(model, head):
    state = AdapterState(head)
    _mix_in(model, state)
    heads = {id(variable) for variable in head_variables(model).values()}
    for variable in model.trainable_variables:
        own = state.head_thawed if id(variable) in heads else state.thawed
        own.append(variable)
    for path, layer in layer_tree.walk(model):
        is_norm = isinstance(layer, keras.layers.BatchNormalization)
        in_head = any(path == h or path.startswith(h + ".") for h in head)
        if is_norm and not in_head and layer.trainable:
            state.batch_norms.append(layer)
    _freeze(state)
    state.heads[None] = _read(head_variables(model))


def _mix_in(model, state):
    layer_tree.mix_in(model, AdaptedModel)
    layer_tree.serialize_as(model, _SAVED_AS)
    layer_tree.set_plain(model, "peft", state)


def _freeze(state):
    # Variable by variable: `trainable` of a container does nothing on
    # TensorFlow and thaws all below it on JAX. Batch normalization alone is
    # frozen as a layer, or it would go on moving its statistics.
    for layer in state.batch_norms:
        layer.trainable = False
    for variable in state.thawed:
        variable.trainable = False


def uninstall(model, name):
    """Takes one adapter off; with the last one the model is plain again."""
    state = state_of(model)
    layers = dict(layer_tree.walk(model))
    taken = {
        path: layer_tree.detach(layers[path], name)
        for path in named(model, name).paths
    }
    state.heads.pop(name)
    state.active.pop(name, None)
    state.adapters.pop(name)
    if not state.adapters:
        _become_plain(model)
    return taken


def strip(model):
    """Takes all adapters off and keeps the head's live values.

    Returns `{name: {path: adapter}}` for `reinstall`; the state that belongs
    to them stays whole.
    """
    layers = dict(layer_tree.walk(model))
    taken = {
        name: {p: layer_tree.detach(layers[p], name) for p in adapter.paths}
        for name, adapter in model.peft.adapters.items()
    }
    _become_plain(model)
    return taken


def reinstall(model, state, adapters):
    """Undoes `strip`."""
    layers = dict(layer_tree.walk(model))
    _mix_in(model, state)
    for name, leaves_of in adapters.items():
        for path, leaf in leaves_of.items():
            layer_tree.attach(layers[path], name, leaf)
    _freeze(state)
    activate(model, state.active)
    layer_tree.forget_compiled(model)


def _become_plain(model):
    state = model.peft
    for layer in state.batch_norms:
        layer.trainable = True
    for variable in state.thawed + state.head_thawed:
        variable.trainable = True
    layer_tree.mix_out(model)
    object.__delattr__(model, "peft")
    layer_tree.forget_compiled(model)


def _read(variables):
    return [keras.ops.convert_to_numpy(v) for v in variables.values()]


def activate(model, strengths):
    """Makes exactly the adapters of `strengths` take part.

    Strengths are variables and the head's values are assigned: compiled
    functions stay valid unless the set of trainable variables changes.
    """
    state = state_of(model)
    before = [id(v) for v in model.trainable_variables]
    for name, adapter in state.adapters.items():
        for leaf in leaves(model, name).values():
            leaf.strength.assign(strengths.get(name, 0.0))
            for variable in leaf.learned:
                variable.trainable = adapter.trainable and name in strengths
    _swap_head(model, next(iter(strengths), None))
    trains = any(state.adapters[name].trainable for name in strengths)
    for variable in state.head_thawed:
        variable.trainable = trains
    state.active = dict(strengths)
    if before != [id(v) for v in model.trainable_variables]:
        layer_tree.forget_compiled(model)


def quiet(model):
    """Gives every adapter strength 0 and the head its base values.

    What trains stays as it is, and so do compiled functions.
    """
    for name in model.peft.adapters:
        for leaf in leaves(model, name).values():
            leaf.strength.assign(0.0)
    _swap_head(model, None)


def _swap_head(model, name):
    state, variables = model.peft, head_variables(model)
    if name == state.head_of:
        return
    state.heads[state.head_of] = _read(variables)
    for variable, value in zip(
        variables.values(), state.heads[name], strict=True
    ):
        variable.assign(value)
    state.head_of = name
