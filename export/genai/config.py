"""`genai_config.json`: what onnxruntime-genai must know besides the graph."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keras_peft.export.genai import graph
from keras_peft.export.genai.facts import Facts

NAME = "genai_config.json"
# What a Hugging Face folder says of generation, under the same names here.
_SETTINGS = (
    "do_sample",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
)


def genai_config(
    facts: Facts,
    context_length: int,
    end: Sequence[int] = (),
    pad: int | None = None,
    start: int | None = None,
) -> dict[str, Any]:
    """The settings of a decoder and its tokens.

    Args:
        facts: The decoder's sizes.
        context_length: How many tokens a prompt and its answer may have.
        end: Tokens that end an answer.
        pad: Token that fills shorter prompts of a batch up.
        start: Token that a text starts with, where there is one.
    """
    tokens: dict[str, Any] = {"bos_token_id": start, "pad_token_id": pad}
    if end:
        tokens["eos_token_id"] = list(end) if len(end) > 1 else end[0]
    kinds = ("key", "value")
    return {
        "model": {
            "type": facts.genai_type,
            "vocab_size": facts.vocabulary_size,
            "context_length": context_length,
            **{name: id for name, id in tokens.items() if id is not None},
            "decoder": {
                "filename": graph.FILE,
                "hidden_size": facts.hidden_size,
                "head_size": facts.head_size,
                "num_attention_heads": facts.num_heads,
                "num_key_value_heads": facts.num_kv_heads,
                "num_hidden_layers": facts.num_layers,
                # Without it, a warning for each place of an adapter.
                "session_options": {
                    "log_severity_level": 3,
                    "provider_options": [],
                },
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    **{
                        f"past_{kind}_names": f"past_key_values.%d.{kind}"
                        for kind in kinds
                    },
                },
                "outputs": {
                    "logits": "logits",
                    **{
                        f"present_{kind}_names": f"present.%d.{kind}"
                        for kind in kinds
                    },
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": context_length,
            "past_present_share_buffer": facts.shares_buffer,
        },
    }


def generation_settings(hf_folder: str | Path | None) -> dict[str, Any]:
    """How a model was meant to be sampled from, where its folder says so."""
    if hf_folder is None:
        return {}
    path = Path(hf_folder) / "generation_config.json"
    if not path.is_file():
        return {}
    found = json.loads(path.read_text("utf-8"))
    return {name: found[name] for name in _SETTINGS if name in found}
