"""The other methods that PEFT and keras_peft share."""

import numpy as np
import peft
import pytest
from families import FAMILIES
from families import copy_head
from families import inputs
from families import of_ours
from families import of_peer
from families import ours
from families import peer
from families import rows
from safetensors.numpy import load_file
from test_peft_lora import QUIET
from test_peft_lora import assert_close
from test_peft_lora import moved
from test_peft_lora import randomize
from test_peft_lora import task

import keras_peft

pytestmark = QUIET

LLAMA = dict(target_modules=["q_proj", "v_proj", "down_proj"])
THEIRS = {
    "ia3": (peft.IA3Config, dict(feedforward_modules=["down_proj"])),
    "loha": (peft.LoHaConfig, dict(r=3, alpha=5, init_weights=False)),
    "lokr": (peft.LoKrConfig, dict(r=2, alpha=5, init_weights=False)),
    "lokr-both": (
        peft.LoKrConfig,
        dict(r=1, decompose_both=True, init_weights=False),
    ),
    "lokr-factor": (
        peft.LoKrConfig,
        dict(r=2, decompose_factor=2, init_weights=False),
    ),
    "vera": (peft.VeraConfig, dict(r=5)),
    "oft": (peft.OFTConfig, dict(oft_block_size=4)),
    "oft-exact": (
        peft.OFTConfig,
        dict(oft_block_size=4, use_cayley_neumann=False),
    ),
    "oft-terms": (
        peft.OFTConfig,
        dict(oft_block_size=8, num_cayley_neumann_terms=7),
    ),
    "oft-share": (peft.OFTConfig, dict(oft_block_size=4, block_share=True)),
    "oft-blocks": (peft.OFTConfig, dict(r=2, oft_block_size=0)),
}


@pytest.mark.parametrize("name", ["llama", "gemma"])
@pytest.mark.parametrize("config, settings", THEIRS.values(), ids=THEIRS)
def test_a_folder_of_peft_both_ways(config, settings, name, tmp_path):
    base = peer(name, tmp_path / "base")
    model = ours(name, tmp_path / "base")
    arrays = inputs(name)
    before = of_ours(model, arrays)
    config = config(task_type="CAUSAL_LM", **LLAMA, **settings)
    tuned = peft.get_peft_model(base, config).eval()
    randomize(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    keras_peft.load_adapter(model, tmp_path / "adapter")
    found = of_ours(model, arrays)
    assert moved(found, before)
    assert_close(found, of_peer(tuned, arrays))
    keras_peft.save_adapter(model, tmp_path / "again", format="peft")
    first, second = (
        load_file(tmp_path / folder / "adapter_model.safetensors")
        for folder in ("adapter", "again")
    )
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)
    fresh = peer(name, tmp_path / "base")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "again").eval()
    assert_close(of_peer(again, arrays), found)


PROMPTS = {
    "prompt": (peft.PromptTuningConfig, {}),
    "prefix": (peft.PrefixTuningConfig, {}),
    "prefix-network": (
        peft.PrefixTuningConfig,
        dict(prefix_projection=True, encoder_hidden_size=8),
    ),
}
TEXTS = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "gpt2"),
    *("gemma", "gemma2", "gemma3", "bert", "roberta", "bart"),
)


@pytest.mark.parametrize(
    "name, row",
    [
        row
        for row in rows(TEXTS, PROMPTS, "prompt")
        # There the first token of a prompt is classified, here the first word,
        # and no prefix is an encoder's.
        if row.id not in ("roberta-prompt", "bart-prefix")
        and row.id != "bart-prefix-network"
    ],
)
def test_tokens_in_front_both_ways(name, row, tmp_path):
    config, settings = row
    base = peer(name, tmp_path / "base")
    model = ours(name, tmp_path / "base")
    copy_head(base, model)
    arrays = inputs(name)
    before = of_ours(model, arrays)
    config = config(
        task_type=task(FAMILIES[name]), num_virtual_tokens=3, **settings
    )
    tuned = peft.get_peft_model(base, config).eval()
    randomize(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    keras_peft.load_adapter(model, tmp_path / "adapter")
    found = of_ours(model, arrays)
    assert moved(found, before)
    assert_close(found, tail(of_peer(tuned, arrays), found))
    keras_peft.save_adapter(model, tmp_path / "again", format="peft")
    fresh = peer(name, tmp_path / "base")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "again").eval()
    assert_close(tail(of_peer(again, arrays), found), found)


def tail(outputs, like):
    """Without the positions of the tokens in front, which PEFT returns."""
    return outputs[:, -like.shape[1] :] if outputs.ndim > 2 else outputs
