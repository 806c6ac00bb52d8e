"""Adding adapters to a model, choosing among them, taking them off."""

import contextlib
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras

from keras_peft import adapted_model
from keras_peft import adapter_state
from keras_peft import base_format
from keras_peft import keras_quantized
from keras_peft import layer_tree
from keras_peft.adapter_state import NamedAdapter
from keras_peft.calibration import observe
from keras_peft.check_tokenizer import warn_of_tokenizer
from keras_peft.methods.method import Method
from keras_peft.patterns import lies_in
from keras_peft.patterns import path_matches
from keras_peft.quantize_aware import aware
from keras_peft.targets import Candidates
from keras_peft.targets import find_head
from keras_peft.targets import no_match
from keras_peft.targets import select


def adapt(
    model: keras.Model,
    method: Method,
    targets: str | Sequence[str] | None = None,
    name: str = "default",
    head: str | Sequence[str] | None = None,
    calibration: Any = None,
    batch_norm: str = "frozen",
    base: str | None = None,
    quantize_aware: str | None = None,
) -> keras.Model:
    r"""Adds an adapter to `model`, in place, and freezes its base.

    Afterwards the adapter's variables and the head train, nothing else does:
    every base variable keeps its bits through `fit`, the statistics of batch
    normalization included. An adapter whose method starts at the identity
    leaves the outputs as they were.

    With several adapters the newest is the active one; `set_adapter` chooses.

    A model that Keras quantized with GPTQ or AWQ is a base as it is: it keeps
    its integers, `merge` gives plain kernels in its floating-point dtype, and
    `remove` the quantized model again.

    Args:
        model: Any built Keras model, a keras-hub backbone or task included.
        method: Settings of a method, such as `keras_peft.LoRA(rank=8)`.
        targets: What to adapt: layer names (`"query"`), regular expressions
            over the end of a layer's path (`r"layers\.[01]\..*"`), or groups:
            `"attention"`, `"mlp"`, `"all-linear"`, `"embeddings"`,
            `"convolutions"`. Groups leave the head out. `None` takes the
            linear layers of transformer blocks, attention and feed-forward,
            experts included; without blocks, all linear and recurrent layers;
            and the convolutions too where they hold more weights.
        name: Name of the adapter, for a model that carries several.
        head: Layers that train in full and are saved with the adapter, named
            as in `targets`. `None` finds them: whatever stands outside
            `model.backbone`, or outside the only model among the layers.
            An empty list is no head.
        calibration: Inputs of the model to choose start values by, for methods
            that do so, such as `LoRA(init="eva")`: a batch (an array, or a
            dictionary of arrays), or an iterable of batches.
        batch_norm: `"frozen"`: batch normalization keeps its scales, offsets
            and statistics, and uses these in training too. `"trained"`: every
            such layer is part of the head. Its scale and offset train, its
            statistics follow the data, all are saved, switched and removed
            with the adapter, and `merge` keeps them: for images unlike those
            of the base, in batches of 16 or more. A layer that was frozen
            before stays so. Chosen with a model's first adapter.
        base: `"nf4"`, `"int4"` or `"int8"`: the kernels of the frozen base
            are rounded to 4 or 8 bits, in blocks of 64, and computed again
            wherever they are needed, so that a model takes a quarter or half
            of the memory. `Dense` and `EinsumDense` layers, and banks of
            experts, of 64 inputs and outputs or more, adapted or not, outside
            the head. `"nf4"` fits
            kernels best in 4 bits
            ([Dettmers et al., 2023](https://arxiv.org/abs/2305.14314)).
            `merge` gives the model kernels in its dtype again; `remove` leaves
            the rounded base. `None` keeps the weights as they are.
            `keras_peft.quantized_base` is for models that do not fit first.
        quantize_aware: `"int4"` or `"int8"`, for `LoRA`: the adapted layers
            compute with kernel and change rounded as the exporter rounds, so
            that training makes up for it, and `export.to_genai` ships the
            very integers that trained. Needs `calibration`, by which grids
            are chosen and in 4 bits the integers to start from, by GPTQ; of
            each layer the products of its inputs are kept meanwhile. `None`
            trains in floating point.

    Returns:
        `model`.

    Raises:
        ValueError: if the model is not built, a target names no layer, a
            layer cannot take the method, the name is taken, `calibration` is
            missing or useless, `batch_norm="trained"` finds no layer, or
            `base` no kernel. The model is then as it was.

    Example:
    >>> keras_peft.adapt(classifier, keras_peft.LoRA(rank=8))
    >>> classifier.compile("adam", "sparse_categorical_crossentropy")
    >>> classifier.fit(sentences, labels)
    """
    _check_arguments(model, method, name)
    with base_format.quantized_taken(model):
        if quantize_aware is not None:
            _check_one_rounding(model, base, quantize_aware)
            method = aware(method, quantize_aware)
        _check_calibration(method, calibration)
        head = _head_of(model, head)
        candidates = Candidates(model, head, method.accepts)
        paths = _paths_of(candidates, method, targets)
        norms = _norms_of_head(model, head, paths, batch_norm)
        method = method.for_layers(candidates, paths)
        _check_patterns(candidates, method, paths)
        layers = layer_tree.layers_by_path(model)
        adapted = {path: layers[path] for path in paths}
        check_layers(adapted, method)
        observed = None
        if method.calibrated:
            observed = observe(model, adapted, calibration, method.observes)
        head = [*_without(head, paths), *norms]
        formats = base_format.formats_to_take(model, base, head)
        adapter = NamedAdapter(method, paths)
        with base_format.packed(model, formats):
            adapted_model.install(model, name, adapter, head, True, observed)
        adapted_model.activate(model, {name: 1.0})
    warn_of_tokenizer(model)
    return model


def _check_arguments(model, method, name):
    if not isinstance(model, keras.Layer):
        raise TypeError(
            "`model` must be a Keras model or layer. "
            f"Received: {type(model).__name__}"
        )
    if not isinstance(method, Method):
        raise TypeError(
            "`method` must be the settings of a method, such as "
            f"`keras_peft.LoRA(rank=8)`. Received: method={method!r}"
        )
    if not isinstance(name, str) or not name or name.startswith("_"):
        raise ValueError(
            "`name` must be a non-empty string that does not start with an "
            f"underscore. Received: name={name!r}"
        )
    if not model.built or not model.variables:
        raise ValueError(
            f"`{model.name}` has no weights yet. Call it on a batch of data, "
            "or `build()` it, before adapting it. "
            f"Received: {type(model).__name__} with built={model.built}"
        )
    if adapter_state.is_adapted(model):
        if name in model.peft.adapters:
            raise ValueError(
                "The model has an adapter of that name already. Choose "
                "another `name`, or `keras_peft.remove(model, name)` it "
                f"first. Received: name={name!r}"
            )
        return
    for path, layer in layer_tree.walk(model):
        if adapter_state.is_adapted(layer) or layer_tree.is_adapted(layer):
            raise ValueError(
                f"Layer `{path}` of the model is adapted already. Adapt and "
                "merge the model as a whole, or that layer alone. "
                f"Received: model={model.name!r}"
            )


def _paths_of(candidates, method, targets):
    if targets is not None:
        return select(candidates, targets)
    paths = method.default_targets(candidates)
    if not paths:
        raise ValueError(no_match(candidates, [], targets))
    return paths


def _without(head, paths):
    """The layers of the head in which none is adapted."""
    return [h for h in head if not any(lies_in(path, [h]) for path in paths)]


def _check_one_rounding(model, base, quantize_aware):
    if base is not None or base_format.formats(model):
        raise ValueError(
            "`quantize_aware` rounds the kernels to what is shipped, which "
            "leaves none to be rounded for a base in 4 or 8 bits. Choose one "
            f"of the two. Received: quantize_aware={quantize_aware!r}, "
            f"base={base!r}"
        )


def _check_calibration(method, calibration):
    if method.calibrated and calibration is None:
        raise ValueError(
            "The method starts from what the layers' inputs look like. Pass "
            "`calibration`, one or more batches of the model's inputs. "
            f"Received: calibration=None, method={method}"
        )
    if calibration is not None and not method.calibrated:
        raise ValueError(
            "The method has no use for `calibration`; leave it out. Received: "
            f"calibration of type {type(calibration).__name__}, method={method}"
        )


def _head_of(model, head):
    if adapter_state.is_adapted(model):
        if head is not None:
            raise ValueError(
                "The head of a model is chosen with its first adapter. "
                f"Leave `head` out. Received: head={head!r}"
            )
        return model.peft.head
    if head is None:
        return find_head(model)
    named = [head] if isinstance(head, str) else list(head)
    layers = dict(layer_tree.walk(model))
    found = {
        target: [
            path
            for path, layer in layers.items()
            if layer.variables
            and (layer.name == target or path_matches(target, path))
        ]
        for target in named
    }
    if missing := [target for target, paths in found.items() if not paths]:
        candidates = Candidates(model, ())
        raise ValueError(no_match(candidates, missing, named, "head"))
    return sorted({path for paths in found.values() for path in paths})


def _norms_of_head(model, head, paths, batch_norm):
    """Paths of the batch normalization that `batch_norm` adds to the head."""
    if batch_norm not in ("frozen", "trained"):
        raise ValueError(
            "`batch_norm` must be 'frozen' or 'trained'. "
            f"Received: batch_norm={batch_norm!r}"
        )
    if batch_norm == "frozen":
        return []
    if adapter_state.is_adapted(model):
        if model.peft.batch_norms:
            raise ValueError(
                "The model's first adapter froze batch normalization. Leave "
                "`batch_norm` out, or `keras_peft.remove(model)` all adapters "
                f"first. Received: batch_norm={batch_norm!r}"
            )
        return []
    norms = adapted_model.trained_norms(model)
    found = [path for path in norms if not lies_in(path, head)]
    taken = [path for path in found if path in paths]
    if not found or taken:
        raise ValueError(
            "`batch_norm='trained'` is for a model whose base has trainable "
            "batch normalization, which no adapter sits on: it trains as part "
            "of the head. Leave `batch_norm` out, or choose other `targets`. "
            f"Received: {f'targets {taken}' if taken else 'a model without'}"
        )
    return found


def _check_patterns(candidates, method, paths):
    unmatched = [
        pattern
        for pattern in method.patterns
        if not any(path_matches(pattern, path) for path in paths)
    ]
    if unmatched:
        raise ValueError(
            no_match(candidates, unmatched, list(method.patterns), "patterns")
        )


def check_layers(layers: Mapping[str, keras.Layer], method: Method) -> None:
    """Raises a `ValueError` that names every layer the method cannot take."""
    objections = []
    for path, layer in layers.items():
        objection = _objection(layer, method) or method.objection(path, layer)
        if objection:
            objections.append(f"`{path}`: {objection}")
    if objections:
        raise ValueError(
            f"{len(objections)} of {len(layers)} layers cannot be adapted: "
            f"{'; '.join(objections)}. Choose other `targets` or settings. "
            f"Received: method={method}"
        )


def _objection(layer, method):
    if not method.accepts(layer):
        kind = layer_tree.base_class(layer).__name__
        return f"a {kind} cannot carry {type(method).__name__}"
    mode = getattr(layer, "quantization_mode", None)
    if mode in keras_quantized.MODES:
        return (
            f"its {mode} was not calibrated; leave it out with the `filters` "
            "of `model.quantize`, or make it part of a calibrated block"
        )
    if mode:
        return (
            f"Keras quantized it, and what it is called on ({mode}); adapt "
            "the float model with `base='int8'`, or merge, then quantize"
        )
    if getattr(layer, "lora_enabled", False):
        return "Keras' own LoRA is enabled on it"
    return None


def set_adapter(
    model: keras.Model, names: str | Sequence[str] | Mapping[str, float] | None
) -> None:
    """Chooses which adapters take part.

    Switching assigns a few scalars, and the values of the head: compiled
    functions stay valid, unless other variables train than before.

    Args:
        model: An adapted model.
        names: One name; several, whose changes are added up (the head is the
            first one's); a dict from names to strengths, each a factor on
            the adapter's change; or `None` for the base alone.

    Raises:
        ValueError: if a name is unknown, or an adapter that adds tokens is
            given another strength than 1, or another such beside it.
    """
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, Mapping):
        names = dict.fromkeys(names or (), 1.0)
    for name in names:
        adapter_state.named(model, name)
    adapter_state.state_of(model)
    _check_exclusive(model, names)
    adapted_model.activate(model, names)


def _check_exclusive(model, strengths):
    alone = [
        name
        for name in strengths
        if any(a.exclusive for a in adapter_state.leaves(model, name).values())
    ]
    wrong = {name: strengths[name] for name in alone if strengths[name] != 1}
    if wrong or len(alone) > 1:
        raise ValueError(
            "An adapter that adds tokens acts as a whole: its strength is 1, "
            "and no other such is active. `None` switches all off. "
            f"Received: names={dict(strengths)}"
        )


@contextlib.contextmanager
def disabled(model: keras.Model) -> Iterator[keras.Model]:
    """Within, `model` is its base alone; after, as it was before.

    >>> with keras_peft.disabled(model):
    ...     base_outputs = model.predict(x)
    """
    active = dict(adapter_state.state_of(model).active)
    adapted_model.quiet(model)
    try:
        yield model
    finally:
        adapted_model.activate(model, active)


def remove(model: keras.Model, name: str | None = None) -> keras.Model:
    """Drops the adapter called `name`, or all of them.

    Without adapters the model is the pretrained one again, its head and what
    was trainable included.

    Raises:
        ValueError: if the model has no such adapter.
    """
    state = adapter_state.state_of(model)
    names = list(state.adapters) if name is None else [name]
    for each in names:
        adapter_state.named(model, each)
    active = {n: s for n, s in state.active.items() if n not in names}
    adapted_model.activate(model, active)
    for each in names:
        adapted_model.uninstall(model, each)
    return model
