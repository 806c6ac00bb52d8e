"""What PEFT's LoRA can do beyond two matrices per module."""

import peft
import pytest
from families import copy_head
from families import inputs
from families import of_ours
from families import of_peer
from families import ours
from families import peer
from test_peft_lora import QUIET
from test_peft_lora import assert_close
from test_peft_lora import moved
from test_peft_lora import randomize

import keras_peft

pytestmark = [
    *QUIET,
    # That both uses of a tied matrix are adapted, which is the point.
    pytest.mark.filterwarnings("ignore:.*tie:UserWarning"),
]

ROWS = {
    "patterns": (
        "llama",
        dict(
            target_modules=["q_proj", "v_proj", "down_proj"],
            r=2,
            lora_alpha=3,
            rank_pattern={"q_proj": 4, r"layers.1.mlp.down_proj": 3},
            alpha_pattern={r"layers\.0.*": 7},
        ),
    ),
    "stabilized-patterns": (
        "gpt2",
        dict(
            target_modules=["c_attn"],
            r=2,
            use_rslora=True,
            rank_pattern={r"h.1.attn.c_attn": 4},
            fan_in_fan_out=True,
        ),
    ),
    "some-layers": (
        "qwen3",
        dict(target_modules=["q_proj", "o_proj"], layers_to_transform=[1]),
    ),
    "regular-expression": (
        "llama",
        dict(target_modules=r".*layers\.0\..*(gate|up)_proj"),
    ),
    "all-linear": ("llama", dict(target_modules="all-linear")),
    "gaussian": (
        "llama",
        dict(target_modules=["q_proj"], init_lora_weights="gaussian"),
    ),
    "pissa": (
        "gpt2",
        dict(
            target_modules=["c_attn", "c_fc"],
            init_lora_weights="pissa",
            lora_alpha=5,
            r=3,
            fan_in_fan_out=True,
        ),
    ),
    "pissa-llama": (
        "llama",
        dict(
            target_modules=["q_proj", "down_proj"],
            init_lora_weights="pissa",
            r=3,
            use_rslora=True,
        ),
    ),
    "olora": (
        "llama",
        dict(
            target_modules=["q_proj", "down_proj"],
            init_lora_weights="olora",
            lora_alpha=4,
            r=3,
        ),
    ),
    "embedding": (
        "bert",
        dict(target_modules=["word_embeddings", "query"], r=3, lora_alpha=5),
    ),
    "embedding-dora": (
        "bert",
        dict(target_modules=["word_embeddings"], r=3, use_dora=True),
    ),
    "tied": (
        "gemma",
        dict(
            target_modules=["embed_tokens", "q_proj"],
            r=3,
            lora_alpha=5,
            ensure_weight_tying=True,
        ),
    ),
    "convolution": (
        "vit",
        dict(target_modules=["projection", "q_proj"], r=3, lora_alpha=5),
    ),
    "convolution-dora": (
        "vit",
        dict(target_modules=["projection"], r=3, use_dora=True),
    ),
    "head": (
        "roberta",
        dict(target_modules=["query"], task_type="SEQ_CLS"),
    ),
    "adapted-head": (
        "bert",
        dict(target_modules=["classifier", "query"], r=2),
    ),
    "saved-modules": (
        "llama",
        dict(target_modules=["q_proj"], modules_to_save=["norm", "lm_head"]),
    ),
}


@pytest.mark.parametrize("name, settings", ROWS.values(), ids=ROWS)
def test_a_folder_of_peft_computes_the_same_here(name, settings, tmp_path):
    base = peer(name, tmp_path / "base")
    model = ours(name, tmp_path / "base")
    copy_head(base, model)
    arrays = inputs(name)
    before = of_ours(model, arrays)
    tuned = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
    randomize(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    keras_peft.load_adapter(model, tmp_path / "adapter")
    found = of_ours(model, arrays)
    assert moved(found, before)
    assert_close(found, of_peer(tuned, arrays))
    # And back.
    keras_peft.save_adapter(model, tmp_path / "again", format="peft")
    fresh = peer(name, tmp_path / "base")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "again").eval()
    assert_close(of_peer(again, arrays), found)
