"""Walking a built model, and putting adapters into its layers.

The only file that touches private Keras. Checked on Keras 3.15.1.

An adapted layer stays the same object in the same place: it is given a
subclass of its own class, whose `call` adds what its adapters return. No
parent, no graph and no path to a weight changes, so functional nodes,
attributes, lists, heads and `generate()` go on as before.
"""

import contextlib
import functools
import re
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras.src.backend import AutocastScope
from keras.src.backend.common.global_state import get_global_attribute
from keras.src.backend.common.global_state import set_global_attribute
from keras.src.backend.common.masking import get_keras_mask
from keras.src.backend.common.masking import set_keras_mask
from keras.src.backend.common.stateless_scope import get_stateless_scope
from keras.src.backend.common.variables import get_autocast_scope
from keras.src.saving.object_registration import GLOBAL_CUSTOM_NAMES
from keras.src.utils.naming import to_snake_case

from keras_peft.compiling import as_computed
from keras_peft.kernel_reads import mixins_for
from keras_peft.kernels import has_kernel
from keras_peft.kernels import is_packed
from keras_peft.methods.adapter import Adapter
from keras_peft.methods.adapter import CallAdapter
from keras_peft.methods.adapter import KernelAdapter
from keras_peft.methods.adapter import VariableAdapter
from keras_peft.replacing import replaced

# Tracked by Keras beside the layers that a user sees.
_NOT_CHILDREN = (keras.Loss, keras.Metric)
# Attributes in which Keras, TensorFlow and torch keep lists of their own.
_BOOKKEEPING = (
    "_layers",
    "_operations",
    "_functional",
    "_nodes",
    "_modules",
    "_self_",
)


def walk(model: keras.Layer) -> Iterator[tuple[str, keras.Layer]]:
    """Yields `(path, layer)` for every layer below `model`, each once.

    A path joins attribute names and list positions:
    `backbone.transformer_layers.0._self_attention_layer._query_dense`. A layer
    that no attribute holds goes by its name, and where Keras chose the name,
    by its kind and position (`dense_1`), so that building the same model twice
    gives the same paths.
    """
    seen = {id(model)}

    def below(parent, prefix):
        for segment, child in children(parent):
            if id(child) in seen:
                continue
            seen.add(id(child))
            path = prefix + segment
            yield path, child
            yield from below(child, path + ".")

    yield from below(model, "")


def children(parent: keras.Layer) -> Iterator[tuple[str, keras.Layer]]:
    """Yields `(segment of the path, layer)` for what `parent` holds itself."""
    if isinstance(parent, keras.Sequential):
        found = list(parent.layers)
    else:
        found = _held(parent)
    attributes = _attribute_names(parent, {id(child) for child in found})
    adapters = parent.adapters.values() if is_adapted(parent) else ()
    adapters = {id(adapter) for adapter in adapters}
    counts: dict[str, int] = {}
    for child in found:
        if isinstance(child, _NOT_CHILDREN) or id(child) in adapters:
            continue
        yield attributes.get(id(child)) or _stable_name(child, counts), child


def _held(parent):
    """The layers of a parent, in the order in which it came to hold them.

    On torch, what a backbone of keras-hub sets first goes past Keras.
    """
    known = list(parent._layers)
    first: dict[int, keras.Layer] = {}
    for name, value in vars(parent).items():
        if not name.startswith(_BOOKKEEPING):
            items = value if isinstance(value, list) else [value]
            layers = [la for la in items if isinstance(la, keras.Layer)]
            first |= {id(layer): layer for layer in layers}
    if first.keys() <= {id(layer) for layer in known}:
        return known
    return [*first.values(), *(la for la in known if id(la) not in first)]


def _attribute_names(parent, wanted):
    """`{id(child): "attr" or "attr.3"}`; torch keeps layers in `_modules`."""
    names: dict[int, str] = {}

    def note(value, name):
        if id(value) in wanted:
            names.setdefault(id(value), name)
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                note(item, f"{name}.{index}")
        elif isinstance(value, dict):
            for key, item in value.items():
                note(item, f"{name}.{key}")

    attributes = dict(vars(parent))
    attributes.update(attributes.get("_modules") or {})
    for name, value in attributes.items():
        if not name.startswith(_BOOKKEEPING):
            note(value, _public_name(parent, name, value))
    return names


def _public_name(parent, name, value):
    """`backbone` for `_backbone`, where a property shows it so."""
    public = name.lstrip("_")
    shown = getattr(type(parent), public, None)
    if public != name and isinstance(shown, property):
        return public if getattr(parent, public) is value else name
    return name


def _stable_name(layer, counts):
    kind = to_snake_case(base_class(layer).__name__)
    if not re.fullmatch(rf"{re.escape(kind)}(_\d+)?", layer.name):
        return layer.name
    count = counts.get(kind, 0)
    counts[kind] = count + 1
    return f"{kind}_{count}" if count else kind


def own_variables(layer: keras.Layer) -> list[keras.Variable]:
    """What a layer holds itself, without the states of random generators.

    A kernel that is computed stands for what it is computed from.
    """
    packed = packed_kernels(layer)
    parts = {id(part) for v in packed for part in v.parts.values()}
    return [
        *packed,
        *(v for v in stored_variables(layer) if id(v) not in parts),
    ]


def stored_variables(layer: keras.Layer) -> list[keras.Variable]:
    """The same, as they are in memory."""
    variables = layer._trainable_variables + layer._non_trainable_variables
    return [v for v in variables if not is_generator(v)]


def learned_variables(layer: keras.Layer) -> list[keras.Variable]:
    """Of these, what was made to be trained, frozen or not: no statistics."""
    return [*packed_kernels(layer), *layer._trainable_variables]


def packed_kernels(layer: keras.Layer) -> list[Any]:
    """The kernels of a layer that are in 4 or 8 bits."""
    return [v for v in vars(layer).values() if is_packed(v)]


def is_training(layer: keras.Layer) -> bool:
    """Whether `layer` is being called for training."""
    return bool(layer._get_call_context().get_value("training"))


def this_call() -> Callable[[], contextlib.AbstractContextManager]:
    """Takes down how layers are called now: for training, and in what dtype.

    So are the segments of the batch. Within what the returned function gives,
    layers are called so again.
    """
    call = get_global_attribute(_CALL)
    numbers = segments()
    scope = get_autocast_scope()

    @contextlib.contextmanager
    def again():
        with _passing_down(_CALL, call), calling_with_segments(numbers):
            with AutocastScope(scope and scope.dtype):
                yield

    return again


def segments() -> Any:
    """Segment numbers `(batch, tokens)` of the batch being called, or `None`.

    Padding is 0, and the sequences of a row are 1, 2, ...
    """
    return get_global_attribute(_SEGMENTS)


def calling_with_segments(
    numbers: Any,
) -> contextlib.AbstractContextManager[None]:
    """Within, `segments()` are `numbers`."""
    return _passing_down(_SEGMENTS, numbers)


@contextlib.contextmanager
def _passing_down(name, value):
    before = get_global_attribute(name)
    set_global_attribute(name, value)
    try:
        yield
    finally:
        set_global_attribute(name, before)


def values_of(variables: Sequence[keras.Variable]) -> list[Any]:
    """What variables are now, in their own dtype."""
    with AutocastScope(None):
        return [keras.ops.convert_to_tensor(v.value) for v in variables]


def is_random(layer: keras.Layer) -> bool:
    """Whether a layer draws random numbers in training."""
    return any(map(is_generator, layer.variables))


def is_generator(variable: keras.Variable) -> bool:
    """Whether a variable is the state of a random generator."""
    return "seed_generator" in variable.path


def layout_of(variable: keras.Variable) -> Any:
    """The layout by which a variable lies on devices, or `None`."""
    return getattr(variable, "_layout", None)


def set_layout(variable: keras.Variable, layout: Any) -> None:
    """Lays a variable out on devices, now and whenever it is assigned."""
    variable._layout = layout
    variable.assign(variable.value)


def lay_out(
    variable: keras.Variable, distribution: keras.distribution.DataParallel
) -> None:
    """Lays a variable out as if it was created under `distribution`."""
    variable._layout = None
    set_layout(variable, distribution.get_variable_layout(variable))


# -- Adapted layers ----------------------------------------------------------

# What a layer does after its kernel. It is taken off the layer while that is
# adapted and applied after the adapters: a change of the kernel comes before.
_AFTER_KERNEL = ("activation", "logit_soft_cap")

# In a weights file, beside an adapted layer's own variables: a layer without
# adapters refuses the extra entry, rather than load the bare base unnoticed.
_MARK = "adapted"

# Under this name Keras keeps what is passed down through a call.
_CALL = "current_call_ctx"

# Under this one we do, for layers that are handed no segment numbers.
_SEGMENTS = "keras_peft_segments"

# Attribute with `{name: why}` of methods that an instance answers itself.
_REPLACED = "replaced_methods"


class AdaptedLayer:
    """Mixed into the class of a layer that carries adapters.

    From the outside in: what stands around the call, what changes the kernel,
    and what changes the layer's other variables.
    """

    mixin_depth = 1

    def call(self, *args, **kwargs):
        if not args and "inputs" in kwargs:
            args = (kwargs.pop("inputs"),)
        call = self._call_kernel
        for adapter in self._adapters_of(CallAdapter):
            call = functools.partial(adapter.around, call)
        with self.reading_itself():
            return call(*args, **kwargs)

    @contextlib.contextmanager
    def reading_itself(self):
        """Within, the layer and its adapters read the kernel of the base."""
        before = self.reads_itself
        set_plain(self, "reads_itself", True)
        try:
            yield
        finally:
            set_plain(self, "reads_itself", before)

    def is_read_by_another(self):
        """Whether a model is called, but this layer is not."""
        calling = get_global_attribute(_CALL) is not None
        return calling and not self.reads_itself

    def linear_outputs(self, inputs):
        """What the layer and its adapters compute before the activation."""
        adapters = self._adapters_of(KernelAdapter)
        return self._add_changes(adapters, inputs, (), {}, False)[1]

    def kernel_inputs(self, inputs):
        """`inputs`, for the layer's own kernel."""
        return inputs

    def low_rank_products(self, adapter, inputs, ups):
        """`adapter.products(inputs, ups)`."""
        return adapter.products(inputs, ups)

    def joined_outputs(self, adapters, inputs, gain=None):
        """What the layer and its adapters compute, as one product.

        `None` where each computes its own. `gain` is that of an adapter which
        scales what is returned: see `KernelAdapter.scaling`.
        """

    def _adapters_of(self, kind):
        return [a for a in self.adapters.values() if isinstance(a, kind)]

    def _call_kernel(self, *args, **kwargs):
        adapters = self._adapters_of(KernelAdapter)
        if not adapters and not self.after_kernel:
            return self._call_base(*args, **kwargs)
        inputs, *args = args
        reverse = False
        if isinstance(self, keras.layers.ReversibleEmbedding):
            reverse = kwargs.get("reverse", args[0] if args else False)
            if reverse and not self.tie_weights:
                adapters = []
        outputs, changed = self._add_changes(
            adapters, inputs, args, kwargs, reverse
        )
        changed = self._after_kernel(changed, reverse)
        mask = get_keras_mask(outputs)
        if mask is not None:
            set_keras_mask(changed, mask)
        return changed

    def _add_changes(self, adapters, inputs, args, kwargs, reverse):
        """`(outputs of the base, outputs with every adapter's change)`."""
        moving = [adapter for adapter in adapters if adapter.on_inputs]
        adding = [adapter for adapter in adapters if not adapter.on_inputs]
        scaling = None if reverse else self._scaling_of(adapters)
        gain, more = scaling or (None, None)
        changed = None
        if adding and not moving:
            changed = outputs = self.joined_outputs(adding, inputs, gain)
        if changed is None:
            moved = inputs if moving else self.kernel_inputs(inputs)
            for adapter in moving:
                moved = moved + self._in_rows(adapter, adapter(inputs))
            changed = outputs = self._call_base(moved, *args, **kwargs)
            if adding and (moving or self._adapters_of(VariableAdapter)):
                # Each change is one of the base, not of another's outputs.
                outputs = super().call(inputs, *args, **kwargs)
            for adapter in adding:
                if scaling is None:
                    change = adapter(inputs, outputs, reverse=reverse)
                else:
                    change = adapter.low_rank(inputs, outputs.dtype, gain=gain)
                changed = changed + self._in_rows(adapter, change)
        if adapters and not in_contained():
            # XLA computes a plain sum again in the backward pass and keeps all
            # its terms until then: twice the memory of an adapted layer. Where
            # a whole block is computed again, nothing is kept.
            changed = as_computed(changed)
        if scaling is not None:
            changed = adapters[0].scaled(changed, more)
        return outputs, changed

    def _scaling_of(self, adapters):
        """The `scaling()` of an adapter that no other is beside."""
        others = len(adapters) > 1 or self._adapters_of(VariableAdapter)
        if not adapters or others or adapters[0].rows is not None:
            return None
        return adapters[0].scaling()

    def _in_rows(self, adapter, change):
        """`change` in those rows of the batch that belong to `adapter`."""
        if adapter.rows is None:
            return change
        if self._get_call_context().get_value("training"):
            raise ValueError(
                "Rows with adapters of their own are for inference. Leave the "
                "`with keras_peft.adapter_names(...)` block before training. "
                f"Received: training=True in layer {self.name!r}"
            )
        count, (size, *rest) = len(adapter.rows), change.shape
        if size != count:
            raise ValueError(
                f"`adapter_names` named {count} rows, but the first axis of "
                f"what {self.name!r} computes is {size}. Call the model, or "
                "its `predict_on_batch`, on as many rows as there are names. "
                f"Received: a change of shape {tuple(change.shape)}"
            )
        rows = adapter.rows.reshape(count, *(1 for _ in rest))
        return change * keras.ops.cast(rows, change.dtype)

    def _call_base(self, *args, **kwargs):
        """The layer's own call, with the variables that adapters change."""
        adapters = self._adapters_of(VariableAdapter)
        if not adapters:
            return super().call(*args, **kwargs)
        # Added up as `merge` does, before the layer casts what it reads.
        with AutocastScope(None):
            sums = {}
            changes = [change for a in adapters for change in a.additions()]
            for variable, added in changes:
                _, total = sums.get(id(variable), (variable, variable))
                total = keras.ops.cast(total, "float32") + added
                sums[id(variable)] = variable, total
        with StandIns(sums.values()) as scope:
            outputs = super().call(*args, **kwargs)
        if scope.outer is None:
            self.add_loss(scope.losses)
        return outputs

    def _after_kernel(self, outputs, reverse):
        activation = self.after_kernel.get("activation")
        if activation is not None:
            outputs = activation(outputs)
        soft_cap = self.after_kernel.get("logit_soft_cap")
        if reverse and soft_cap is not None:
            outputs = keras.ops.tanh(outputs / soft_cap) * soft_cap
        return outputs

    def save_own_variables(self, store):
        super().save_own_variables(store)
        store[_MARK] = np.array(len(self.adapters))

    def load_own_variables(self, store):
        own = {key: store[key] for key in store.keys() if key != _MARK}
        super().load_own_variables(own)

    def get_config(self):
        raise ValueError(_alone("serialized", self))

    @classmethod
    def from_config(cls, config):
        raise ValueError(_alone("cloned", cls))

    # A property: Keras puts a `quantize` of its own on every instance.
    @property
    def quantize(self):
        return self._refuse_quantize

    def _refuse_quantize(self, *args, **kwargs):
        raise ValueError(
            f"Layer {self.name!r} carries adapters, which quantizing would "
            "leave outside. Call `keras_peft.merge(model)` first. "
            f"Received: adapters={list(self.adapters)}"
        )

    def enable_lora(self, *args, **kwargs):
        raise ValueError(
            f"Layer {self.name!r} carries adapters of keras_peft already. Use "
            "`keras_peft.remove(model)` first, or keep to one of the two. "
            f"Received: adapters={list(self.adapters)}"
        )


def stand_in(variable: keras.Variable) -> Any:
    """What `variable` stands for now, if not for its own value."""
    scope = get_stateless_scope()
    return None if scope is None else scope.get_current_value(variable)


class StandIns(keras.StatelessScope):
    """Within, some variables stand for other values.

    All else is as outside: what other variables are, that they can be
    assigned (recurrent states, random generators), and losses.
    """

    def __init__(self, values):
        values = [(v, keras.ops.cast(value, v.dtype)) for v, value in values]
        super().__init__(values, initialize_variables=False)
        self.outer = get_stateless_scope()
        self.collect_losses = self.outer is None or self.outer.collect_losses
        if self.outer is not None:
            self.losses = self.outer.losses

    def get_current_value(self, variable):
        value = super().get_current_value(variable)
        if value is None and self.outer is not None:
            value = self.outer.get_current_value(variable)
        return value

    def add_update(self, update):
        variable, value = update
        if self.outer is None:
            variable._direct_assign(value)
        else:
            self.outer.add_update(update)


class Contained(StandIns):
    """Within, what is assigned and what is lost stays inside."""

    def __init__(self, values):
        super().__init__(values)
        self.losses = []
        self.updates = {}

    def add_update(self, update):
        variable, value = update
        self.updates[id(variable)] = update
        self.state_mapping[id(variable)] = value


def in_contained() -> bool:
    """Whether what is computed now lies within `Contained`."""
    scope = get_stateless_scope()
    while isinstance(scope, StandIns):
        if isinstance(scope, Contained):
            return True
        scope = scope.outer
    return False


def _alone(done, layer):
    name = getattr(layer, "name", None) or layer.__name__
    return (
        f"An adapted layer cannot be {done} outside of its model: its adapters "
        "would be lost. Use `model.save()` on the model that was adapted, "
        "`keras_peft.save_adapter()`, or `keras_peft.merge(model)` first. "
        f"Received: layer={name!r}"
    )


def is_adapted(layer: keras.Layer) -> bool:
    """Whether `layer` itself carries adapters."""
    return isinstance(layer, AdaptedLayer)


def variable_adapters(layer: keras.Layer) -> list[VariableAdapter]:
    """The adapters that change variables of an adapted layer."""
    return layer._adapters_of(VariableAdapter)


def layers_by_path(model: keras.Layer) -> dict[str, keras.Layer]:
    """`{path: layer}` of all that can be adapted: `""` is the model itself."""
    return {"": model, **dict(walk(model))}


def adapted_layers(model: keras.Layer) -> list[tuple[str, keras.Layer]]:
    """`(path, layer)` of every layer of `model` that carries adapters."""
    layers = layers_by_path(model)
    return [(path, la) for path, la in layers.items() if is_adapted(la)]


def attach(layer: keras.Layer, name: str, adapter: Adapter) -> None:
    """Adds `adapter` to `layer` under `name`."""
    with unlocked(layer):
        if not is_adapted(layer):
            for mixin in (AdaptedLayer, *mixins_for(layer)):
                mix_in(layer, mixin)
            held = {
                attribute: getattr(layer, attribute)
                for attribute in _AFTER_KERNEL
                if hasattr(layer, attribute) and has_kernel(layer)
            }
            set_plain(layer, "after_kernel", held)
            set_plain(layer, "reads_itself", False)
            _set_after_kernel(layer, dict.fromkeys(held))
            layer.adapters = {}
        if adapter.mixin is not None and not isinstance(layer, adapter.mixin):
            mix_in(layer, adapter.mixin)
        layer.adapters[name] = adapter


def detach(layer: keras.Layer, name: str) -> Adapter:
    """Takes an adapter off; without any, the layer is what it was before."""
    with unlocked(layer):
        adapter = layer.adapters.pop(name)
        mixins = {other.mixin for other in layer.adapters.values()}
        if adapter.mixin is not None and adapter.mixin not in mixins:
            mix_out(layer, adapter.mixin)
        if not layer.adapters:
            _set_after_kernel(layer, layer.after_kernel)
            del layer.adapters
            object.__delattr__(layer, "after_kernel")
            object.__delattr__(layer, "reads_itself")
            for mixin in (AdaptedLayer, *mixins_for(layer)):
                mix_out(layer, mixin)
    return adapter


def _set_after_kernel(layer, values):
    for name, value in values.items():
        set_plain(layer, name, value)


def set_plain(target, name, value):
    """Sets an attribute that neither Keras nor torch is to track."""
    object.__setattr__(target, name, value)


def replace_child(parent: keras.Layer, name: str, layer: keras.Layer) -> None:
    """Puts another layer in the place of one that has no weights."""
    old = getattr(parent, name)
    with unlocked(parent):
        setattr(parent, name, layer)
        if any(child is old for child in parent._layers):
            parent._tracker.untrack(old)


def replace_method(
    target: keras.Layer, name: str, method: Callable, why: str = ""
) -> None:
    """Lets `method(target, ...)` answer in the place of a method of its class.

    The class stays, so that adapters come and go and files are written as
    before. `method_of_class` is what it was. `why` is shown to users.
    """
    set_plain(target, name, functools.partial(method, target))
    replaced = vars(target).get(_REPLACED, {})
    set_plain(target, _REPLACED, {**replaced, name: why})


def reasons(model: keras.Layer) -> dict[str, int]:
    """`{why: number of layers}` of what was replaced in `model`."""
    layers = [model, *(layer for _, layer in walk(model))]
    found = [{*vars(layer).get(_REPLACED, {}).values()} for layer in layers]
    whys = sorted({why for each in found for why in each} - {""})
    return {why: sum(why in each for each in found) for why in whys}


def restore_methods(target: keras.Layer) -> set[str]:
    """Undoes every `replace_method`; returns the names."""
    replaced = set(vars(target).get(_REPLACED, ()))
    if replaced:
        for name in (*replaced, _REPLACED):
            object.__delattr__(target, name)
    return replaced


@contextlib.contextmanager
def replacing_for_now(targets: Sequence[keras.Layer]) -> Iterator[None]:
    """Within, methods may be replaced; afterwards they are as before."""
    before = []
    for target in targets:
        own = vars(target)
        names = (*own[_REPLACED], _REPLACED) if _REPLACED in own else ()
        before.append({name: own[name] for name in names})
    try:
        yield
    finally:
        for target, replaced in zip(targets, before, strict=True):
            restore_methods(target)
            for name, value in replaced.items():
                set_plain(target, name, value)


def is_replaced(target: keras.Layer, name: str) -> bool:
    """Whether `replace_method` hides a method of `target`."""
    return name in vars(target).get(_REPLACED, ())


def method_of_class(target: keras.Layer, name: str) -> Callable:
    """The method of `target` that `replace_method` hides."""
    return functools.partial(getattr(type(target), name), target)


def untrack(layer: keras.Layer, variable: keras.Variable) -> None:
    """Takes a variable off a layer."""
    layer._untrack_variable(variable)


def track(layer: keras.Layer, variable: keras.Variable) -> None:
    """Adds a variable that does not train."""
    with unlocked(layer):
        layer._track_variable(variable)


def position_of(layer: keras.Layer, variable: keras.Variable) -> int:
    """Which of a layer's variables that are made to be trained it is."""
    return [id(v) for v in layer._trainable_variables].index(id(variable))


def track_at(
    layer: keras.Layer, variable: keras.Variable, position: int
) -> None:
    """Adds a variable that is made to be trained, at a position."""
    with unlocked(layer):
        layer._tracker.add_to_store("trainable_variables", variable)
        variables = layer._trainable_variables
        variables.insert(position, variables.pop())
        layer._post_track_variable(variable)


def set_quantized(layer: keras.Layer, quantized: bool) -> None:
    """Says whether Keras quantized a layer: it does not do so twice."""
    layer._is_quantized = quantized


@contextlib.contextmanager
def after_build(function: Callable[[keras.Layer], None]) -> Iterator[None]:
    """Within, `function` is called on every layer as soon as it is built."""
    before = keras.Layer._post_build

    def post_build(layer):
        before(layer)
        function(layer)

    with replaced(keras.Layer, _post_build=post_build):
        yield


def forget_parameters(model: keras.Layer) -> None:
    """Lets torch find parameters anew: every layer has a list of its own."""
    if keras.config.backend() == "torch":
        for layer in [model, *(layer for _, layer in walk(model))]:
            vars(layer)["_modules"].pop("_torch_params", None)


@contextlib.contextmanager
def unlocked(layer: keras.Layer) -> Iterator[None]:
    """Within, variables and layers can be added to a built layer."""
    tracker = layer._tracker
    locked = tracker.locked
    tracker.unlock()
    try:
        yield
    finally:
        if locked:
            tracker.lock(tracker._lock_violation_msg)


# -- Classes -----------------------------------------------------------------

# `{(mixins, class): subclass}`, and the reverse.
_SUBCLASSES: dict[tuple, type] = {}
_PARTS: dict[type, tuple[tuple[type, ...], type]] = {}


def mix_in(target: keras.Layer, mixin: type) -> None:
    """Gives `target` a subclass of its own class, with `mixin` in front.

    Of several, those of a greater `mixin_depth` are nearer to the class. The
    subclass bears the name of the class: the layout of weights files and
    `model.summary()` follow class names.
    """
    before = type(target)
    mixins, cls = _parts(before)
    mixins = sorted(
        (mixin, *mixins), key=lambda kind: getattr(kind, "mixin_depth", 0)
    )
    target.__class__ = _subclass(tuple(mixins), cls)
    if before in GLOBAL_CUSTOM_NAMES:
        serialize_as(target, GLOBAL_CUSTOM_NAMES[before])


def mix_out(target: keras.Layer, mixin: type) -> None:
    """Undoes `mix_in`."""
    mixins, cls = _parts(type(target))
    target.__class__ = _subclass(
        tuple(other for other in mixins if other is not mixin), cls
    )


def _subclass(mixins, cls):
    if not mixins:
        return cls
    key = (mixins, cls)
    if key not in _SUBCLASSES:
        same = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
        made = type(cls.__name__, (*mixins, cls), same)
        _SUBCLASSES[key], _PARTS[made] = made, key
    return _SUBCLASSES[key]


def _parts(cls):
    return _PARTS.get(cls, ((), cls))


def base_class(target: keras.Layer) -> type:
    """The class of `target` without what `mix_in` added."""
    return _parts(type(target))[1]


def serialize_as(target: keras.Layer, registered_name: str) -> None:
    """Makes Keras write `registered_name` as the class of `target`."""
    GLOBAL_CUSTOM_NAMES[type(target)] = registered_name


@contextlib.contextmanager
def plain(model: keras.Layer) -> Iterator[None]:
    """Within, `model` and all below it serialize as if never adapted."""
    touched = []
    for layer in [model, *(layer for _, layer in walk(model))]:
        if base_class(layer) is not type(layer):
            touched.append((layer, type(layer)))
            if is_adapted(layer):
                _set_after_kernel(layer, layer.after_kernel)
            layer.__class__ = base_class(layer)
    try:
        yield
    finally:
        for layer, cls in touched:
            layer.__class__ = cls
            if is_adapted(layer):
                _set_after_kernel(layer, dict.fromkeys(layer.after_kernel))


# -- Graphs ------------------------------------------------------------------


def steps_back(
    tensor: keras.KerasTensor,
) -> Iterator[tuple[keras.Operation, Any, Callable]]:
    """Yields `(operation, its input, step)` from the end of a graph back.

    `step(value)` applies the operation as the graph does. Ends before the
    first operation that has not exactly one tensor as its input.
    """
    while True:
        history = tensor._keras_history
        node = history.operation._inbound_nodes[history.node_index]
        if node.is_input or len(node.input_tensors) != 1:
            return
        tensor = node.input_tensors[0]
        yield node.operation, tensor, functools.partial(_apply, node, tensor)


def _apply(node, tensor, value):
    args, kwargs = node.arguments.fill_in({id(tensor): value})
    return node.operation(*args, **kwargs)


# -- Training ----------------------------------------------------------------


def compiled_metrics(
    model: keras.Model, targets: Any, outputs: keras.KerasTensor
) -> list[tuple[keras.Metric, bool]]:
    """`(metric, whether sample weights are for it)` of `model.compile`."""
    compiled = model._compile_metrics
    if compiled is None:
        return []
    if not compiled.built:
        compiled.build(targets, outputs)
    groups = [(group, False) for group in compiled._flat_metrics]
    groups += [(group, True) for group in compiled._flat_weighted_metrics]
    return [
        (metric, weighted)
        for group, weighted in groups
        if group is not None
        for metric in getattr(group, "metrics", None) or [group]
    ]


@contextlib.contextmanager
def other_loss(model: keras.Model, loss: Callable) -> Iterator[None]:
    """Within, `loss` is what `model` was compiled with."""
    before = model._compile_loss
    set_plain(model, "_compile_loss", loss)
    try:
        yield
    finally:
        set_plain(model, "_compile_loss", before)


def function_of_metric(metric: keras.metrics.MeanMetricWrapper) -> Callable:
    """`function(targets, outputs)`, of which the metric is the mean."""
    return functools.partial(metric._fn, **metric._fn_kwargs)


def start_at_epoch(model: keras.Model, epoch: int) -> None:
    """Lets a `fit` that has begun go on with another epoch."""
    model._initial_epoch = epoch


def drop_variables(optimizer: keras.Optimizer, variables: list) -> None:
    """Takes variables off an optimizer that were added to it."""
    for variable in variables:
        optimizer._tracker.untrack(variable)


def forget_compiled(model: keras.Layer, optimizer: bool = True) -> None:
    """Drops compiled functions: they hold the graph from before a change.

    So do the slots of the `optimizer`, if other variables train than before.
    """
    for name in (
        "train_function",
        "test_function",
        "predict_function",
        "generate_function",
    ):
        if getattr(model, name, None) is not None:
            setattr(model, name, None)
    if getattr(model, "_jax_state_synced", None) is False:
        model.jax_state_sync()
    used = getattr(model, "optimizer", None)
    if optimizer and used is not None and used.built:
        fresh = type(used).from_config(used.get_config())
        with unlocked(model):
            model.optimizer = fresh
