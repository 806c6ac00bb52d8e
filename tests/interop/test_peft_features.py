"""What PEFT's LoRA can do beyond two matrices per module."""

import json

import keras
import numpy as np
import peft
import pytest
import transformers
from families import copy_head
from families import inputs
from families import of_ours
from families import of_peer
from families import ours
from families import peer
from safetensors.numpy import load_file
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch
from test_peft_lora import QUIET
from test_peft_lora import assert_close
from test_peft_lora import moved
from test_peft_lora import randomize
from test_peft_lora import randomize_ours

import keras_peft
from keras_peft import LoRA
from keras_peft import adapter_state

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
    "bias": (
        "bert",
        dict(target_modules="all-linear", r=3, lora_alpha=5, lora_bias=True),
    ),
    "bias-fused": (
        "gpt2",
        dict(
            target_modules=["c_attn", "c_proj"],
            r=2,
            lora_alpha=3,
            rank_pattern={r"h.1.attn.c_attn": 4},
            lora_bias=True,
            fan_in_fan_out=True,
        ),
    ),
    "bias-convolution": (
        "vit",
        dict(target_modules=["projection", "q_proj"], r=3, lora_bias=True),
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


# -- Names -------------------------------------------------------------------


def adapter_of(base, tmp_path, **settings):
    """A random adapter that PEFT saved; `(PEFT model, folder)`."""
    tuned = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
    randomize(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    return tuned, tmp_path / "adapter"


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "bart"])
def test_which_class_was_wrapped_does_not_matter(name, tmp_path):
    base = peer(name, tmp_path / "base")
    arrays = inputs(name)
    targets = ["q_proj", "query", "c_attn"]
    tuned, folder = adapter_of(base, tmp_path, target_modules=targets)
    backbone = ours(name, tmp_path / "base").backbone
    keras_peft.load_adapter(backbone, folder)
    inner = tuned.base_model.model.base_model
    found, expected = of_ours(backbone, arrays), of_peer(inner, arrays)
    assert_close(found, expected)
    # A backbone alone goes to the class without a head, and from there to
    # one with.
    keras_peft.save_adapter(backbone, tmp_path / "bare", format="peft")
    folder = tmp_path / "bare"
    keys = load_file(folder / "adapter_model.safetensors")
    headed = f"base_model.model.{base.base_model_prefix}."
    assert not any(key.startswith(headed) for key in keys)
    plain = transformers.AutoModel.from_pretrained(tmp_path / "base")
    bare = peft.PeftModel.from_pretrained(plain, folder).eval()
    assert_close(of_peer(bare, arrays), found)
    model = ours(name, tmp_path / "base")
    copy_head(base, model)
    keras_peft.load_adapter(model, folder)
    if name != "bert":  # Its head was trained as well, and is not there.
        assert_close(of_ours(model, arrays), of_peer(tuned, arrays))


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3"])
def test_module_names_of_older_transformers(name, tmp_path):
    base = peer(name, tmp_path / "base")
    tuned, folder = adapter_of(
        base, tmp_path, target_modules=["q_proj", "o_proj", "fc1", "up_proj"]
    )
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for new, old in OLDER[name].items():
        assert any(new in key for key in tensors)
        tensors = {k.replace(new, old): v for k, v in tensors.items()}
    save_file(tensors, file)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {"target_modules": None}
    path.write_text(json.dumps(config))
    model = ours(name, tmp_path / "base")
    copy_head(base, model)
    keras_peft.load_adapter(model, folder)
    arrays = inputs(name)
    assert_close(of_ours(model, arrays), of_peer(tuned, arrays))


_OLDER_ATTENTION = {
    "attention.q_proj": "attention.attention.query",
    "attention.o_proj": "attention.output.dense",
}
OLDER = {
    "vit": {
        **_OLDER_ATTENTION,
        "vit.layers": "vit.encoder.layer",
        "mlp.fc1": "intermediate.dense",
    },
    "dinov2": _OLDER_ATTENTION,
    "dinov3": {"model.layer.": "layer."},
}

# -- Files -------------------------------------------------------------------


def test_an_adapter_in_bfloat16(tmp_path):
    base = peer("llama", tmp_path / "base")
    tuned, folder = adapter_of(base, tmp_path, target_modules=["q_proj"])
    for parameter in tuned.parameters():
        parameter.data = parameter.data.bfloat16().float()
    state = peft.get_peft_model_state_dict(tuned)
    state = {key: value.bfloat16() for key, value in state.items()}
    save_torch(state, folder / "adapter_model.safetensors")
    model = ours("llama", tmp_path / "base")
    keras_peft.load_adapter(model, folder)
    assert {v.dtype for v in adapter_variables(model)} == {"float32"}
    found = {
        name: keras.ops.convert_to_numpy(leaf.lora_kernel_a).T
        for name, leaf in adapter_leaves(model).items()
    }
    layer = "backbone.transformer_layers.1.self_attention._query_dense"
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    assert np.array_equal(found[layer], state[key].float().numpy())


def adapter_leaves(model):
    return adapter_state.leaves(model, "default")


def adapter_variables(model):
    return [v for leaf in adapter_leaves(model).values() for v in leaf.learned]


def test_a_start_that_changes_the_base_converted_by_peft(tmp_path):
    base = peer("llama", tmp_path / "base")
    config = peft.LoraConfig(
        target_modules=["q_proj", "down_proj"],
        init_lora_weights="pissa",
        r=3,
        lora_alpha=5,
    )
    tuned = peft.get_peft_model(base, config).eval()
    tuned.peft_config["default"].init_lora_weights = True
    tuned.save_pretrained(tmp_path / "start")
    tuned.peft_config["default"].init_lora_weights = "pissa"
    randomize(tuned)
    tuned.save_pretrained(
        tmp_path / "adapter",
        path_initial_model_for_weight_conversion=tmp_path / "start",
    )
    model = ours("llama", tmp_path / "base")
    keras_peft.load_adapter(model, tmp_path / "adapter")
    arrays = inputs("llama")
    fresh = peer("llama", tmp_path / "base")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert_close(of_ours(model, arrays), of_peer(again.eval(), arrays))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_residual_start_is_written_with_twice_the_rank(init, tmp_path):
    base = peer("llama", tmp_path / "base")
    model = ours("llama", tmp_path / "base")
    keras_peft.adapt(model, LoRA(3, init=init, scaling="rank_stabilized"))
    randomize_ours(model)
    keras_peft.save_adapter(model, tmp_path / "adapter", format="peft")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["r"] == 6 and config["init_lora_weights"] is True
    tuned = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    arrays = inputs("llama")
    assert_close(of_ours(model, arrays), of_peer(tuned, arrays))


def test_a_fused_layer_adds_up_the_ranks_of_its_parts(tmp_path):
    base = peer("gpt2", tmp_path / "base")
    model = ours("gpt2", tmp_path / "base")
    ranks = {"query_dense": 2, "key_dense": 3}
    alphas = {"key_dense": 1}
    method = LoRA(4, alpha=6, rank_pattern=ranks, alpha_pattern=alphas)
    keras_peft.adapt(model, method, targets=["query", "key"])
    randomize_ours(model)
    keras_peft.save_adapter(model, tmp_path / "adapter", format="peft")
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    key = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
    assert tensors[key].shape == (5, 16)
    tuned = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    arrays = inputs("gpt2")
    assert_close(of_ours(model, arrays), of_peer(tuned, arrays))
    # Back again the blocks fall apart: values are not adapted.
    again = ours("gpt2", tmp_path / "base")
    keras_peft.load_adapter(again, tmp_path / "adapter")
    found = {
        path.rpartition(".")[2]: leaf.lora_kernel_a.shape[1]
        for path, leaf in adapter_leaves(again).items()
    }
    assert found == {"query_dense": 2, "key_dense": 3}
    assert_close(of_ours(again, arrays), of_ours(model, arrays))


def test_a_part_of_a_fused_layer_of_which_only_the_bias_moves(tmp_path):
    base = peer("gpt2", tmp_path / "base")
    model = ours("gpt2", tmp_path / "base")
    alphas = {"key_dense": 1}  # Two scales: the module has only one.
    method = LoRA(2, alpha=6, alpha_pattern=alphas, use_bias=True)
    keras_peft.adapt(model, method, targets=["query", "key"])
    randomize_ours(model)
    for path, leaf in adapter_leaves(model).items():
        if path.endswith("query_dense"):
            leaf.lora_kernel_b.assign(leaf.lora_kernel_b * 0.0)
    keras_peft.save_adapter(model, tmp_path / "adapter", format="peft")
    tuned = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    arrays = inputs("gpt2")
    found = of_ours(model, arrays)
    assert_close(found, of_peer(tuned, arrays))
    assert_close(found, of_peer(tuned.merge_and_unload(), arrays))
    again = ours("gpt2", tmp_path / "base")
    keras_peft.load_adapter(again, tmp_path / "adapter")
    assert adapter_leaves(again).keys() == adapter_leaves(model).keys()
    assert_close(of_ours(again, arrays), found)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_two_folders_in_one_model(name, tmp_path):
    expected, arrays = {}, inputs(name)
    for number, targets in enumerate((["query", "q_proj"], "all-linear")):
        folder = tmp_path / str(number)
        settings = dict(target_modules=targets, modules_to_save=["classifier"])
        if name == "llama":
            del settings["modules_to_save"]
        tuned, _ = adapter_of(peer(name, tmp_path / "base"), folder, **settings)
        expected[str(number)] = of_peer(tuned, arrays)
    model = ours(name, tmp_path / "base")
    base = of_ours(model, arrays)
    for key in expected:
        keras_peft.load_adapter(model, tmp_path / key / "adapter", name=key)
    for key, outputs in expected.items():
        keras_peft.set_adapter(model, key)
        assert_close(of_ours(model, arrays), outputs)
        keras_peft.save_adapter(
            model, tmp_path / "again" / key, name=key, format="peft"
        )
        fresh = peer(name, tmp_path / "base")
        again = peft.PeftModel.from_pretrained(fresh, tmp_path / "again" / key)
        assert_close(of_peer(again.eval(), arrays), outputs)
    keras_peft.remove(model)
    assert np.array_equal(of_ours(model, arrays), base)
