"""What keras-hub drops, found in the model it made."""

import json
import shutil

import keras
import numpy as np
import pytest
from families import FAMILIES
from families import copy_head
from families import ours
from safetensors.numpy import load_file
from safetensors.numpy import save_file

import keras_peft
from keras_peft import LoRA

# What keras-hub drops even where the tiny models agree with it otherwise.
DROPPED = {
    "qwen3": "4 of 9 norms have another",
    "vit": "5 of 5 norms have another",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_else_is_dropped_of_the_tiny_models(name, peers):
    peer, folder = peers[name]
    model = ours(name, folder)
    copy_head(peer, model)
    told = keras_peft.check_base(model, folder)
    assert len(told) == (name in DROPPED), told
    assert DROPPED.get(name, "") in "".join(told)


def changed(folder, tmp_path, **settings):
    """A copy of the folder whose config says something else."""
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return tmp_path / "copy"


@pytest.mark.parametrize(
    "name, settings, words",
    [
        ("bert", dict(hidden_act="gelu"), "4.7e-04 apart"),
        ("roberta", dict(hidden_act="relu"), "'relu'"),
        ("gpt2", dict(activation_function="gelu"), "another function"),
        ("gemma", dict(hidden_activation="gelu"), "another function"),
        ("llama", dict(hidden_act="relu"), "another function"),
        ("llama", dict(rms_norm_eps=1e-5), "5 of 5 norms"),
        ("bert", dict(layer_norm_eps=1e-5), "norms have another"),
    ],
)
def test_a_setting_that_keras_hub_drops_is_told(
    name, settings, words, peers, tmp_path
):
    folder = changed(peers[name][1], tmp_path, **settings)
    model = ours(name, folder)
    copy_head(peers[name][0], model)
    (told,) = keras_peft.check_base(model, folder)
    assert words in told and next(iter(settings)) in told
    keras_peft.adapt(model, LoRA(2))
    assert keras_peft.check_base(model, folder) == [told]


def test_other_weights_are_told(peers):
    _, folder = peers["llama"]
    model = ours("llama", folder)
    kernel = model.backbone.transformer_layers[1]._feedforward_gate_dense.kernel
    kernel.assign(kernel * 1.001)
    (told,) = keras_peft.check_base(model, folder)
    assert "layers.1.mlp.gate_proj.weight" in told and "1 weights" in told


def test_a_weight_without_a_place_is_told(peers, tmp_path):
    _, folder = peers["llama"]
    model = ours("llama", folder)
    folder = changed(folder, tmp_path, attention_bias=True)
    tensors = load_file(folder / "model.safetensors")
    bias = "model.layers.0.self_attn.q_proj.bias"
    tensors[bias] = np.ones(16, "float32")
    save_file(tensors, folder / "model.safetensors")
    (told,) = keras_peft.check_base(model, folder)
    assert bias in told and "no place" in told


def test_the_tokenizer_and_the_chat_template_are_told(peers, tmp_path):
    import keras_hub

    folder = changed(peers["bert"][1], tmp_path)
    settings = {"do_lower_case": True, "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "word"]
    tokenizer = keras_hub.models.BertTokenizer(words, lowercase=True)
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(tokenizer)
    model = keras_hub.models.BertTextClassifier(
        backbone=ours("bert", folder).backbone,
        preprocessor=preprocessor,
        num_classes=3,
    )
    copy_head(peers["bert"][0], model)
    accents, chat = keras_peft.check_base(model, folder)
    assert "strip_accents=True" in accents and "chat template" in chat


def test_a_folder_without_a_config_is_refused(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="Received: hf_folder="):
        keras_peft.check_base(model, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no backbone"):
        keras_peft.check_base(model, tmp_path)
