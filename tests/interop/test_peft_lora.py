"""LoRA from PEFT and to PEFT, with real `peft` and `transformers`."""

import keras
import numpy as np
import peft
import pytest
import torch
from families import FAMILIES
from families import inputs
from families import of_ours
from families import of_peer
from families import ours
from families import peer
from families import rows
from safetensors.numpy import load_file

import keras_peft
from keras_peft import LoRA

QUIET = [
    # What each tells the other, or its users, of their own changes.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    # What most models of a family have: not these.
    pytest.mark.filterwarnings("ignore:The base of the adapter:UserWarning"),
]

pytestmark = QUIET


def task(family):
    return {
        "AutoModelForCausalLM": "CAUSAL_LM",
        "AutoModelForSequenceClassification": "SEQ_CLS",
        "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    }.get(family.peer)


def randomize(model, seed=0, scale=0.2):
    """Gives the trainable weights of a PEFT model values that matter."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn_like(parameter)


def wrapped(name, tmp_path, config):
    """`(PEFT model, Keras model with its adapter, base difference)`."""
    base = peer(name, tmp_path / "base")
    model = ours(name, tmp_path / "base")
    tuned = peft.get_peft_model(base, config).eval()
    randomize(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    return tuned, model


def assert_close(found, expected):
    # Rounding alone: a dozen matrix products of up to 24 terms, whose order
    # differs, each within 24 * 2**-24 of the largest term.
    limit = 1e-4 * np.abs(expected).max()
    assert np.abs(found - expected).max() <= limit


def moved(found, base):
    return np.abs(found - base).max() > 0.02 * np.abs(base).max()


SETTINGS = {
    "plain": dict(r=4, lora_alpha=6),
    "stabilized": dict(r=4, lora_alpha=6, use_rslora=True),
    "dora": dict(r=2, lora_alpha=3, use_dora=True),
}


def config_for(family, **settings):
    extra = {}
    if family.conv1d:
        extra["fan_in_fan_out"] = True
    if family.image and "Classification" in family.peer:
        extra["modules_to_save"] = ["classifier"]
    return peft.LoraConfig(
        task_type=task(family),
        target_modules=[*family.attention, *family.mlp],
        **settings,
        **extra,
    )


@pytest.mark.parametrize("name, settings", rows(FAMILIES, SETTINGS, "plain"))
def test_an_adapter_of_peft_computes_the_same_here(name, settings, tmp_path):
    config = config_for(FAMILIES[name], **settings)
    tuned, model = wrapped(name, tmp_path, config)
    arrays = inputs(name)
    base = of_ours(model, arrays)
    keras_peft.load_adapter(model, tmp_path / "adapter")
    found, expected = of_ours(model, arrays), of_peer(tuned, arrays)
    assert moved(found, base)
    assert_close(found, expected)
    with tuned.disable_adapter(), keras_peft.disabled(model):
        if "Classifier" not in FAMILIES[name].model:
            assert_close(of_ours(model, arrays), of_peer(tuned, arrays))


OURS = {
    "plain": dict(rank=4, alpha=6),
    "stabilized": dict(rank=4, alpha=6, scaling="rank_stabilized"),
    "dora": dict(rank=2, alpha=3, decompose=True),
    "pissa": dict(rank=2, alpha=3, init="pissa"),
}


def randomize_ours(model, scale=0.2):
    from keras_peft import adapter_state

    rng = np.random.default_rng(1)
    for leaf in adapter_state.leaves(model, "default").values():
        for variable in leaf.learned:
            noise = rng.normal(scale=scale, size=variable.shape)
            value = keras.ops.convert_to_numpy(variable)
            variable.assign(value + noise.astype("float32"))
    for variable in adapter_state.head_variables(model).values():
        noise = rng.normal(scale=scale, size=variable.shape)
        variable.assign(noise.astype("float32"))


@pytest.mark.parametrize("name, settings", rows(FAMILIES, OURS, "plain"))
def test_an_adapter_of_ours_computes_the_same_in_peft(name, settings, tmp_path):
    base = peer(name, tmp_path / "base")
    model = ours(name, tmp_path / "base")
    arrays = inputs(name)
    keras_peft.adapt(model, LoRA(**settings))
    before = of_ours(model, arrays)
    randomize_ours(model)
    found = of_ours(model, arrays)
    assert moved(found, before)
    keras_peft.save_adapter(model, tmp_path / "adapter", format="peft")
    tuned = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert_close(found, of_peer(tuned, arrays))
    written = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert set(written) == set(peft.get_peft_model_state_dict(tuned))
    again = ours(name, tmp_path / "base")
    keras_peft.load_adapter(again, tmp_path / "adapter")
    assert_close(of_ours(again, arrays), found)
