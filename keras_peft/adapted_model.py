"""A model while it is adapted: how it changes, and how it is saved."""

import keras
import numpy as np

from keras_peft import base_format
from keras_peft import layer_tree
from keras_peft.adapter_state import AdapterState
from keras_peft.adapter_state import NamedAdapter
from keras_peft.adapter_state import head_variables
from keras_peft.adapter_state import is_adapted
from keras_peft.adapter_state import leaves
from keras_peft.adapter_state import named
from keras_peft.adapter_state import read
from keras_peft.adapter_state import state_of
from keras_peft.complete_configs import complete_configs
from keras_peft.layouts import follow
from keras_peft.layouts import scope_of
from keras_peft.patterns import lies_in


class AdaptedModel:
    """Mixed into the class of a model that was adapted.

    Keras saves such a model as its base and the adapters' settings, and puts
    the adapters back in before it loads the weights.
    """

    def get_config(self):
        state = self.peft
        with layer_tree.plain(self), complete_configs():
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
            "formats": base_format.formats(self),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        load = keras.saving.deserialize_keras_object
        model = load(config["base"], custom_objects=custom_objects)
        with base_format.packed(model, config.get("formats", {})):
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

    # The layers hold the head of one adapter; those of the others, and the
    # base's own, are no variables.
    def save_own_variables(self, store):
        super().save_own_variables(store)
        for name, keys in self._idle_heads().items():
            for key, value in zip(keys, self.peft.heads[name], strict=True):
                store[key] = value

    def load_own_variables(self, store):
        stored = {key: store[key] for key in store.keys()}
        for name, keys in self._idle_heads().items():
            self.peft.heads[name] = [np.array(stored.pop(key)) for key in keys]
        super().load_own_variables(stored)

    def _idle_heads(self):
        """`{adapter: keys in a weights file}` of heads not in the layers."""
        state = self.peft
        return {
            name: [f"head_{number}_{i}" for i in range(len(state.heads[name]))]
            for number, name in enumerate([None, *state.adapters])
            if name != state.head_of
        }

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


# -- Putting adapters in and out ---------------------------------------------


def install(model, name, adapter, head, initialize=False, observed=None):
    """Creates the adapter's layers, attaches them, freezes the base.

    `observed` is `{path: LayerInputs}`, for start values that need them. All
    that can fail is done before the first layer is touched.
    """
    if is_adapted(model):
        _check_undivided(model)
    layers = layer_tree.layers_by_path(model)
    adapted = {path: layers[path] for path in adapter.paths}
    with scope_of(model):
        created = adapter.method.create_all(adapted, name)
    for path, leaf in created.items():
        follow(layers[path], leaf)
        if initialize:
            leaf.start((observed or {}).get(path))
        else:
            leaf.read_base()
    if not is_adapted(model):
        _become_adapted(model, head)
    for path, leaf in created.items():
        layer_tree.attach(layers[path], name, leaf)
    state = model.peft
    state.adapters[name] = adapter
    state.heads[name] = state.heads[None]
    layer_tree.forget_compiled(model, optimizer=False)


def _become_adapted(model, head):
    state = AdapterState(head)
    _mix_in(model, state)
    heads = {id(variable) for variable in head_variables(model).values()}
    for variable in model.trainable_variables:
        own = state.head_thawed if id(variable) in heads else state.thawed
        own.append(variable)
    for path, layer in trained_norms(model).items():
        inside = lies_in(path, head)
        (state.head_norms if inside else state.batch_norms).append(layer)
    _freeze(state)
    state.heads[None] = read(head_variables(model))


def trained_norms(model):
    """`{path: layer}` of the batch normalization that moves its statistics."""
    return {
        path: layer
        for path, layer in layer_tree.walk(model)
        if isinstance(layer, keras.layers.BatchNormalization)
        and layer.trainable
    }


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
    layers = layer_tree.layers_by_path(model)
    taken = {
        path: layer_tree.detach(layers[path], name)
        for path in named(model, name).paths
    }
    state.heads.pop(name)
    state.active.pop(name, None)
    state.adapters.pop(name)
    if not state.adapters:
        _become_plain(model)
        base_format.give_back(model)
    return taken


def strip(model):
    """Takes all adapters off and keeps the head's live values.

    Returns `{name: {path: adapter}}` for `reinstall`; the state that belongs
    to them stays whole.
    """
    layers = layer_tree.layers_by_path(model)
    taken = {
        name: {p: layer_tree.detach(layers[p], name) for p in adapter.paths}
        for name, adapter in model.peft.adapters.items()
    }
    _become_plain(model)
    return taken


def reinstall(model, state, adapters):
    """Undoes `strip`."""
    layers = layer_tree.layers_by_path(model)
    _mix_in(model, state)
    for name, leaves_of in adapters.items():
        for path, leaf in leaves_of.items():
            layer_tree.attach(layers[path], name, leaf)
    _freeze(state)
    activate(model, state.active)
    layer_tree.forget_compiled(model)


def _become_plain(model):
    state = model.peft
    for layer in state.batch_norms + state.head_norms:
        layer.trainable = True
    for variable in state.thawed + state.head_thawed:
        variable.trainable = True
    layer_tree.mix_out(model, AdaptedModel)
    object.__delattr__(model, "peft")
    layer_tree.forget_compiled(model)


def activate(model, strengths):
    """Makes exactly the adapters of `strengths` take part.

    Strengths are variables and the head's values are assigned: compiled
    functions stay valid unless the set of trainable variables changes, or
    an adapter that changes the program comes or goes.
    """
    state = state_of(model)
    before = [id(v) for v in model.trainable_variables]
    restructured = _set_strengths(model, strengths)
    for name, adapter in state.adapters.items():
        for leaf in leaves(model, name).values():
            for variable in leaf.learned:
                variable.trainable = adapter.trainable and name in strengths
    _swap_head(model, next(iter(strengths), None))
    trains = any(state.adapters[name].trainable for name in strengths)
    for layer in state.head_norms:
        layer.trainable = trains
    for variable in state.head_thawed:
        variable.trainable = trains
    state.active = dict(strengths)
    retrained = before != [id(v) for v in model.trainable_variables]
    if restructured or retrained:
        layer_tree.forget_compiled(model, optimizer=retrained)


def quiet(model):
    """Gives every adapter strength 0 and the head its base values.

    What trains stays as it is.
    """
    if _set_strengths(model, {}):
        layer_tree.forget_compiled(model, optimizer=False)
    _swap_head(model, None)


def divide(model, names):
    """Gives each row of a batch the adapter of its name, `None` the base.

    What trains stays as it is.
    """
    _set_strengths(model, {n: 1.0 for n in names if n is not None})
    _swap_head(model, names[0])
    for name in {*names} - {None}:
        mask = np.array([row == name for row in names], "float32")
        for leaf in leaves(model, name).values():
            leaf.rows = mask
    state = model.peft
    state.rows, state.active = True, {}
    layer_tree.forget_compiled(model, optimizer=False)


def undivide(model, strengths):
    """Undoes `divide`."""
    for name in model.peft.adapters:
        for leaf in leaves(model, name).values():
            leaf.rows = None
    model.peft.rows = False
    activate(model, strengths)
    layer_tree.forget_compiled(model, optimizer=False)


def _check_undivided(model):
    if model.peft.rows:
        raise ValueError(
            "Each row of a batch has its own adapter at the moment. Leave the "
            "`with keras_peft.adapter_names(...)` block first. "
            f"Received: model={model.name!r}"
        )


def _set_strengths(model, strengths):
    """Returns whether the program of a forward pass is another than before."""
    _check_undivided(model)
    restructured = False
    for name in model.peft.adapters:
        for leaf in leaves(model, name).values():
            leaf.strength.assign(strengths.get(name, 0.0))
            present = name in strengths
            restructured |= leaf.structural and leaf.present != present
            leaf.present = present
    return restructured


def _swap_head(model, name):
    state, variables = model.peft, head_variables(model)
    if name == state.head_of:
        return
    state.heads[state.head_of] = read(variables)
    for variable, value in zip(
        variables.values(), state.heads[name], strict=True
    ):
        variable.assign(value)
    state.head_of = name
