"""Adapters in the folder format of Hugging Face PEFT.

Each method has a codec (`peft_lora`, ...) between the tensors of one HF module
and the adapters of the Keras layers that the module corresponds to. Here is
what they have in common: which module is which layer, heads, and that
everything is checked and told at once before a model is touched.
"""

import dataclasses
import re
from pathlib import Path

import keras
import numpy as np

from keras_peft import adapter_state
from keras_peft import peft_files
from keras_peft import peft_ia3
from keras_peft import peft_loha
from keras_peft import peft_lokr
from keras_peft import peft_lora
from keras_peft import peft_oft
from keras_peft import peft_prefix
from keras_peft import peft_prompt
from keras_peft import peft_vera
from keras_peft.check_base import warn_of_base
from keras_peft.hf_layout import Part
from keras_peft.hf_names import OUTPUT
from keras_peft.hf_names import Names
from keras_peft.methods.method import Method
from keras_peft.patterns import lies_in
from keras_peft.patterns import nearest
from keras_peft.peft_codec import Reader
from keras_peft.peft_codec import Writer
from keras_peft.peft_codec import targets
from keras_peft.peft_head import read_head
from keras_peft.peft_head import write_head

CODECS = {
    codec.PEFT_TYPE: codec
    for codec in (
        peft_lora,
        peft_ia3,
        peft_loha,
        peft_lokr,
        peft_oft,
        peft_vera,
        peft_prompt,
        peft_prefix,
    )
}


@dataclasses.dataclass
class Adapter:
    """An adapter that was read, in the terms of a Keras model.

    `tensors` has the keys of keras_peft's own folder.
    """

    method: Method
    paths: list[str]
    head: list[str]
    tensors: dict[str, np.ndarray]


def read(model: keras.Model, folder: Path) -> Adapter:
    """Reads a PEFT folder for `model`, which stays as it is.

    Raises:
        ValueError: with everything that is wrong, named in one message.
    """
    config = peft_files.read_config(folder)
    codec = CODECS.get(config["peft_type"])
    if codec is None:
        raise ValueError(
            f"PEFT's {config['peft_type']} cannot be read; these can: "
            f"{', '.join(CODECS)}. Convert it to LoRA with PEFT's "
            f"`save_as_lora` first. Received: {str(folder)!r}"
        )
    names = Names(model)
    wrong = peft_files.unknown_settings(config, codec.KNOWN)
    reader = Reader(config, names, {}, {}, wrong)
    rest = _sort(reader, codec, peft_files.read_tensors(folder))
    head, head_values = read_head(reader, model, rest)
    if not reader.modules and not reader.shared:
        wrong.append("it holds no tensors of an adapter")
    try:
        wrong += _missing(reader)
        found = codec.read(reader)
    except re.error as error:
        wrong.append(f"a pattern in its settings does not parse: {error}")
    if wrong or found is None:
        raise ValueError(mismatch(folder, wrong))
    method, adapters = found
    # A head that carries an adapter itself does not train in full.
    head = [h for h in head if not any(lies_in(path, [h]) for path in adapters)]
    variables = adapter_state.variables_below(names.layers, head)
    tensors = {f"head:{key}": head_values[key] for key in variables}
    for path, weights in adapters.items():
        tensors |= {f"{path}.{key}": value for key, value in weights.items()}
    paths = list(adapters)
    if codec.SUFFIXES:  # Modules come in the order of the file.
        paths = [path for path in names.layers if path in adapters]
    warn_of_base(names, config.get("base_model_name_or_path"))
    return Adapter(method, paths, head, tensors)


def _sort(reader, codec, tensors):
    """Fills `reader.modules`; returns the tensors that are no adapter's own."""
    rest, unknown = {}, []
    for key, value in tensors.items():
        if key in codec.SHARED:
            reader.shared[key] = value
            continue
        name = key.removeprefix(peft_files.PREFIX).removeprefix("base_model.")
        suffix = next((s for s in codec.SUFFIXES if name.endswith("." + s)), "")
        if not suffix:
            rest[name] = value
            continue
        name = name.removesuffix("." + suffix)
        module = reader.names.find(name) or _output(reader.names, name)
        if module is None:
            unknown.append(name)
        else:
            reader.modules.setdefault(module, {})[suffix] = value
    known = [reader.names.live(module) for module in reader.names.paths]
    for name in dict.fromkeys(unknown):
        reader.wrong.append(
            f"the model has no module `{name}`{nearest(name, known)}"
        )
    return rest


def _output(names, name):
    """A language model's output: no layer of its own, but a codec's matter."""
    has_output = names.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM")
    return OUTPUT if has_output and name.endswith(OUTPUT) else None


def _missing(reader):
    """Modules that the settings name and no tensor is there for."""
    return [
        f"no tensors for `{module}`, which `target_modules` names"
        for module in reader.names.paths
        if module not in reader.modules
        and peft_files.targeted(reader.config, reader.names.renamed(module))
    ]


def mismatch(folder: Path, wrong: list[str]) -> str:
    """The message for a folder that does not fit a model."""
    shown = "; ".join(wrong[:8])
    more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
    return (
        "The PEFT adapter does not fit this model, which was left as it is: "
        f"{shown}{more}. Load it into the base it was trained on. "
        f"Received: {str(folder)!r}"
    )


# -- Writing -----------------------------------------------------------------


def write(model: keras.Model, folder: Path, name: str) -> None:
    """Writes an adapter as a PEFT folder into an existing folder.

    Raises:
        ValueError: with everything that PEFT has no way to say.
    """
    adapter = adapter_state.named(model, name)
    kind = type(adapter.method)
    codec = next((c for c in CODECS.values() if c.METHOD is kind), None)
    if codec is None:
        raise ValueError(
            f"{kind.__name__} has no form in PEFT's files. Convert the "
            "adapter with `keras_peft.to_lora`, merge it, or use "
            f"`format='keras'`. Received: name={name!r} with "
            f"method={adapter.method}"
        )
    names = Names(model)
    leaves = adapter_state.leaves(model, name)
    writer = Writer(adapter.method, names, leaves, {}, {}, [])
    if codec.SUFFIXES:
        _group(writer)
    modules_to_save, tensors = write_head(writer, model, name)
    if writer.wrong:
        raise ValueError(_unwritable(name, adapter, writer.wrong))
    found = codec.write(writer)
    if writer.wrong:
        raise ValueError(_unwritable(name, adapter, writer.wrong))
    settings, modules = found
    for module, weights in modules.items():
        live = names.live(module)
        tensors |= {f"{live}.{key}": value for key, value in weights.items()}
    config = {
        "peft_type": codec.PEFT_TYPE,
        "task_type": _task(names, modules),
        "base_model_name_or_path": None,
        "inference_mode": True,
        "modules_to_save": modules_to_save or None,
        **({"target_modules": targets(names, modules)} if modules else {}),
        **settings,
    }
    # Prompts are not put into modules: PEFT leaves those as they are.
    prefix = peft_files.PREFIX if modules else "base_model."
    tensors = {prefix + key: value for key, value in tensors.items()}
    peft_files.write(folder, config, tensors | writer.shared)


def _unwritable(name, adapter, wrong):
    return (
        f"PEFT's files cannot hold this adapter: {'; '.join(wrong[:8])}. "
        "Use LoRA (`keras_peft.to_lora` converts) on layers that have a "
        "Hugging Face name, merge it, or use `format='keras'`. "
        f"Received: name={name!r} with method={adapter.method}"
    )


def _group(writer):
    for path in writer.leaves:
        part = writer.names.part(path)
        if not isinstance(part, Part):
            writer.wrong.append(f"`{path}` has no name there: {part}")
            continue
        found = {
            p: writer.names.part(p) for p in writer.names.paths[part.module]
        }
        writer.modules[part.module] = found


def _task(names, modules):
    # PEFT adds the head of a classifier to `modules_to_save` by itself, which
    # must not be where an adapter sits on it.
    adapted_head = any(module in names.heads.values() for module in modules)
    return None if adapted_head else names.task
