"""The adapter folder: `adapter.json` and `adapter.safetensors`.

It holds an adapter, its head and its settings, never the base. Loading checks
everything before it changes anything, and executes nothing from a file.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import safetensors
import safetensors.numpy

import keras_peft
from keras_peft import adapted_model
from keras_peft import adapter_state
from keras_peft import base_format
from keras_peft import layer_tree
from keras_peft import peft_files
from keras_peft import peft_folder
from keras_peft.adapt import check_layers
from keras_peft.adapter_state import NamedAdapter
from keras_peft.files import existing_folder
from keras_peft.files import whole_folder
from keras_peft.fingerprint import compare
from keras_peft.fingerprint import fingerprint
from keras_peft.fingerprint import formats_of
from keras_peft.kernels import has_kernel
from keras_peft.kernels import kernel_of
from keras_peft.methods.method import Method
from keras_peft.patterns import nearest
from keras_peft.processes import writes_files

SETTINGS = "adapter.json"
TENSORS = "adapter.safetensors"
_FORMAT = "keras_peft adapter"
_VERSION = 1


def save_adapter(
    model: keras.Model,
    folder: str | Path,
    name: str = "default",
    format: str = "keras",
) -> None:
    """Writes an adapter and its head to `folder`.

    The folder appears whole or not at all; an older one there is replaced. It
    holds kilobytes to megabytes: no weight of the base. Of several processes
    that train a model together, the first one writes.

    Args:
        model: An adapted model.
        folder: Path of the folder.
        name: Which of the model's adapters.
        format: `"keras"`, or `"peft"` for a folder that Hugging Face PEFT, and
            what serves its adapters, loads into the same model of
            transformers. The latter is for the families of keras-hub that it
            can read from Hugging Face.

    Raises:
        ValueError: if the model has no such adapter, or PEFT no way to say
            what it does.
    """
    if format not in ("keras", "peft"):
        raise ValueError(
            f"`format` must be 'keras' or 'peft'. Received: format={format!r}"
        )
    adapter_state.named(model, name)
    if not writes_files(model):
        return
    write = peft_folder.write if format == "peft" else write_adapter
    with whole_folder(folder) as staging:
        write(model, staging, name)


def write_adapter(model: keras.Model, folder: Path, name: str) -> None:
    """Writes the two files of an adapter into an existing folder."""
    adapter = adapter_state.named(model, name)
    layers = layer_tree.layers_by_path(model)
    write_files(
        folder,
        adapter.method,
        {path: _kind(layers[path]) for path in adapter.paths},
        model.peft.head,
        _tensors(model, name),
        fingerprint(model),
    )


def write_files(
    folder: Path,
    method: Method,
    layers: dict[str, dict],
    head: list[str],
    tensors: dict[str, np.ndarray],
    base: dict[str, dict],
) -> None:
    """The same from what the files say."""
    (folder / TENSORS).write_bytes(safetensors.numpy.save(tensors))
    settings = {
        "format": _FORMAT,
        "version": _VERSION,
        "written_by": {
            "keras-peft": keras_peft.__version__,
            "keras": keras.__version__,
        },
        "method": {
            "name": type(method).__name__,
            "settings": method.get_config(),
        },
        "layers": layers,
        "head": head,
        "tensors": {key: list(value.shape) for key, value in tensors.items()},
        "sha256": _sha256(folder / TENSORS),
        "base": base,
    }
    text = json.dumps(settings, indent=2)
    (folder / SETTINGS).write_text(text, encoding="utf-8")


def _kind(layer):
    kernel = kernel_of(layer).variable.shape if has_kernel(layer) else None
    return {
        "layer": layer_tree.base_class(layer).__name__,
        "kernel": None if kernel is None else list(kernel),
    }


def _tensors(model, name):
    convert = keras.ops.convert_to_numpy
    tensors = {
        f"{path}.{key}": convert(variable)
        for path, leaf in adapter_state.leaves(model, name).items()
        for key, variable in leaf.parameters.items()
    }
    for key, value in adapter_state.head_values(model, name).items():
        # Not `ascontiguousarray`, which gives a scalar an axis.
        tensors[f"head:{key}"] = np.asarray(value, order="C")
    return tensors


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_adapter(
    model: keras.Model,
    folder: str | Path,
    name: str = "default",
    trainable: bool = False,
    base: str | None = "as_trained",
) -> keras.Model:
    """Adds the adapter in `folder` to `model` and makes it the active one.

    Everything is checked before `model` is touched: the folder's files, that
    each layer exists with that kernel, every tensor's name, shape and values,
    and that the base is the one the adapter was trained on.

    Args:
        model: The base the adapter was trained on, adapted already or not. If
            it has an adapter called `name` with the same settings, that one
            gets the values of the file.
        folder: Path of a folder that `save_adapter` wrote, or Hugging Face
            PEFT. PEFT's says nothing of the base's weights, so that only their
            shapes can be checked.
        name: What to call the adapter in this model.
        trainable: Whether it, and the head, go on training.
        base: `"as_trained"`: if the adapter was trained over a base in 4 or 8
            bits, that of `model` is rounded to the same, so that it computes
            what the trained one did. `None` leaves the base as it is.

    Returns:
        `model`.

    Raises:
        ValueError: with everything that is wrong, named in one message.
    """
    if base not in ("as_trained", None):
        raise ValueError(
            f"`base` must be 'as_trained' or None. Received: base={base!r}"
        )
    folder = existing_folder(folder)
    with base_format.quantized_taken(model):
        _load(model, folder, name, trainable, base)
    return model


def _load(model, folder, name, trainable, base):
    formats = {}
    if peft_files.is_peft_folder(folder):
        found = peft_folder.read(model, folder)
        method, paths, head = found.method, found.paths, found.head
        tensors = found.tensors
    else:
        settings, method, tensors = read_files(folder)
        paths, head = list(settings["layers"]), list(settings["head"])
        _check_base(model, folder, settings)
        if base is not None:
            formats = _formats_to_take(model, folder, settings)
    with base_format.packed(model, formats):
        _check_model(model, folder, method, paths, head, name)
        expected = _expected(model, method, paths, head)
        _check_tensors(folder, tensors, expected)
        if not _has_adapter(model, name):
            adapter = NamedAdapter(method, paths)
            adapted_model.install(model, name, adapter, head)
    model.peft.adapters[name].trainable = trainable
    _assign(model, name, tensors)
    adapted_model.activate(model, {name: 1.0})


def _has_adapter(model, name):
    return adapter_state.is_adapted(model) and name in model.peft.adapters


def _formats_to_take(model, folder, settings):
    """`{path: format}` of layers to round, as the adapter was trained."""
    trained, now = formats_of(settings["base"]), base_format.formats(model)
    missing = {p: form for p, form in trained.items() if p not in now}
    wrong = [path for path in now if trained.get(path) != now[path]]
    if wrong or (missing and adapter_state.is_adapted(model)):
        raise ValueError(
            "The adapter was trained over a base in "
            f"{_names(trained)}, and this one, which is in {_names(now)}, "
            "cannot become that. Load the adapter into a model as it was "
            "before, or with `base=None` over another base than it knew. "
            f"Received: {str(folder)!r}"
        )
    return missing


def _names(formats):
    return ", ".join(sorted({*formats.values()})) or "its own dtype"


def _assign(model, name, tensors):
    for path, leaf in adapter_state.leaves(model, name).items():
        for key, variable in leaf.parameters.items():
            variable.assign(tensors[f"{path}.{key}"])
    head = {
        key.removeprefix("head:"): value
        for key, value in tensors.items()
        if key.startswith("head:")
    }
    adapter_state.set_head_values(model, name, head)


# -- Reading and checking ----------------------------------------------------


def read_files(folder: Path) -> tuple[dict[str, Any], Method, dict]:
    """`(settings, method, tensors)` of an adapter folder, whole and known."""
    settings = _read_settings(folder)
    method = _read_method(folder, settings)
    return settings, method, _read_tensors(folder, settings)


def _read_settings(folder: Path) -> dict[str, Any]:
    if not (folder / SETTINGS).is_file():
        raise ValueError(
            f"No adapter folder: it has no `{SETTINGS}`. Pass a folder that "
            f"`keras_peft.save_adapter` wrote. Received: {str(folder)!r}"
        )
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        known = settings["format"] == _FORMAT
        version = settings["version"]
        complete = {"method", "layers", "head", "tensors", "sha256", "base"}
        if known and version <= _VERSION and complete - set(settings):
            raise KeyError(*sorted(complete - set(settings)))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"`{SETTINGS}` is damaged or of another kind ({error!r}). Save "
            f"the adapter again. Received: {str(folder)!r}"
        ) from error
    if not known or version > _VERSION:
        raise ValueError(
            f"Expected a {_FORMAT!r} of version {_VERSION} or less. A newer "
            "keras_peft may read it. Received: "
            f"{settings['format']!r} of version {version!r} in {str(folder)!r}"
        )
    return settings


def _read_method(folder, settings):
    name = settings["method"].get("name")
    known = {method.__name__: method for method in Method.__subclasses__()}
    if name not in known:
        raise ValueError(
            f"This version knows the methods {', '.join(known)}. A newer "
            f"keras_peft may know it. Received: method={name!r} in "
            f"{str(folder)!r}"
        )
    try:
        return known[name](**settings["method"]["settings"])
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"The settings of {name} cannot be read: {error}. A newer "
            f"keras_peft may read them. Received: {str(folder)!r}"
        ) from error


def _read_tensors(folder, settings):
    path = folder / TENSORS
    if not path.is_file() or _sha256(path) != settings["sha256"]:
        raise ValueError(
            f"`{TENSORS}` is missing, truncated or was changed: it does not "
            f"fit the checksum in `{SETTINGS}`. Save the adapter again. "
            f"Received: {str(folder)!r}"
        )
    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"`{TENSORS}` is no safetensors file ({error}). Save the adapter "
            f"again. Received: {str(folder)!r}"
        ) from error


def _check_base(model, folder, settings):
    layers = layer_tree.layers_by_path(model)
    wrong = []
    for path, kind in settings["layers"].items():
        if path not in layers:
            wrong.append(f"no layer `{path}`{nearest(path, layers)}")
        elif not layers[path].built or _kind(layers[path]) != kind:
            wrong.append(f"`{path}` is {_kind(layers[path])}, not {kind}")
    wrong += [f"no layer `{p}`" for p in settings["head"] if p not in layers]
    wrong = wrong or compare(model, settings["base"], settings["head"])
    if wrong:
        raise ValueError(_mismatch(folder, wrong))


def _check_model(model, folder, method, paths, head, name):
    layers = layer_tree.layers_by_path(model)
    wrong = []
    if not adapter_state.is_adapted(model):
        check_layers({path: layers[path] for path in paths}, method)
    elif head != model.peft.head:
        wrong.append(f"its head is {model.peft.head}, not {head}")
    elif name in model.peft.adapters:
        adapter = model.peft.adapters[name]
        if (adapter.method, adapter.paths) != (method, paths):
            wrong.append(
                f"its adapter {name!r} has other settings or layers; "
                "`keras_peft.remove(model, name)` it, or load under another "
                "`name`"
            )
    if wrong:
        raise ValueError(_mismatch(folder, wrong))


def _mismatch(folder, wrong):
    shown = "; ".join(wrong[:8])
    more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
    return (
        "The adapter does not fit this model, which was left as it is: "
        f"{shown}{more}. Load it into the base it was trained on. "
        f"Received: {str(folder)!r}"
    )


def _expected(model, method, paths, head):
    """`{key: shape}` of the tensors that the adapter and its head need."""
    layers = layer_tree.layers_by_path(model)
    shapes_by_path = method.all_shapes({path: layers[path] for path in paths})
    expected = {
        f"{path}.{key}": tuple(shape)
        for path, shapes in shapes_by_path.items()
        for key, shape in shapes.items()
    }
    for key, variable in adapter_state.variables_below(layers, head).items():
        expected[f"head:{key}"] = tuple(variable.shape)
    return expected


def _check_tensors(folder, tensors, expected):
    wrong = [f"missing `{key}`" for key in expected if key not in tensors]
    wrong += [f"unexpected `{key}`" for key in tensors if key not in expected]
    for key in expected.keys() & tensors.keys():
        value = tensors[key]
        if value.shape != expected[key]:
            wrong.append(
                f"`{key}` has shape {value.shape}, not {expected[key]}"
            )
        elif value.dtype.kind == "f" and not np.isfinite(value).all():
            wrong.append(f"`{key}` holds NaN or infinity")
    if wrong:
        raise ValueError(_mismatch(folder, sorted(wrong)))
