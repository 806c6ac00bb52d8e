"""Bad PEFT folders: each is refused, named, and changes nothing."""

import contextlib
import json
import shutil

import keras
import numpy as np
import pytest
from families import ours
from safetensors.numpy import load_file
from safetensors.numpy import save_file
from test_peft_lora import QUIET
from test_peft_lora import randomize_ours

import keras_peft
from keras_peft import LoRA

pytestmark = QUIET

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
DOWN = "base_model.model.model.layers.1.mlp.down_proj"
TARGETS = ["query", "feedforward_output_dense"]


@contextlib.contextmanager
def refused(model, *words):
    """Within, a `ValueError` in Keras' form; `model` keeps its bits."""
    before = [keras.ops.convert_to_numpy(v) for v in model.variables]
    kind, trained = type(model), len(model.trainable_variables)
    with pytest.raises(ValueError, match="Received: ") as caught:
        yield
    for word in words:
        assert word in str(caught.value), str(caught.value)
    after = [keras.ops.convert_to_numpy(v) for v in model.variables]
    assert type(model) is kind and trained == len(model.trainable_variables)
    assert len(before) == len(after)
    assert all(map(np.array_equal, before, after))


@pytest.fixture(scope="module")
def saved(peers, tmp_path_factory):
    """`(family folder, adapter folder)` for a Llama."""
    _, base = peers["llama"]
    model = ours("llama", base)
    keras_peft.adapt(model, LoRA(2), targets=TARGETS)
    randomize_ours(model)
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    keras_peft.save_adapter(model, folder, format="peft")
    return base, folder


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved[1], tmp_path / "bad")
    return tmp_path / "bad"


def settings(**changes):
    def apply(folder):
        config = json.loads((folder / SETTINGS).read_text())
        (folder / SETTINGS).write_text(json.dumps(config | changes))

    return apply


def tensors(change):
    def apply(folder):
        found = load_file(folder / TENSORS)
        change(found)
        save_file(found, folder / TENSORS)

    return apply


def put(key, value):
    return tensors(lambda found: found.update({key: value}))


def without(key):
    return tensors(lambda found: found.pop(key))


def turned(found):
    for key in (f"{Q}.lora_A.weight", f"{DOWN}.lora_B.weight"):
        found[key] = np.ascontiguousarray(found[key].T)


def not_a_number(found):
    found[f"{Q}.lora_A.weight"][0, 0] = np.nan


def without_module(found):
    for part in "AB":
        del found[f"{DOWN}.lora_{part}.weight"]


def another_model(found):
    for key in list(found):
        found[key.replace("self_attn.q_proj", "attention.wq")] = found.pop(key)


def more_layers(found):
    found.update(
        {k.replace("layers.1", "layers.7"): v for k, v in found.items()}
    )


def pickled(folder):
    (folder / TENSORS).rename(folder / "adapter_model.bin")


def truncated(folder):
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[: len(data) // 2])


def with_biases(folder):
    settings(lora_bias=True)(folder)
    sizes = {
        key.replace("weight", "bias"): len(value)
        for key, value in load_file(folder / TENSORS).items()
        if key.endswith("lora_B.weight")
    }
    for key, size in sizes.items():
        put(key, np.ones(size, "float32"))(folder)


ONES = np.ones(16, "float32")
BAD = {
    "no json": (
        lambda folder: (folder / SETTINGS).write_bytes(b"\x80 no json"),
        "is damaged",
    ),
    "no type": (settings(peft_type=None), "is damaged"),
    "unknown method": (settings(peft_type="XLORA2"), "XLORA2", "IA3, LOHA"),
    "pickle": (pickled, "a pickle"),
    "truncated": (truncated, "truncated"),
    "newer setting": (settings(use_new=True), "`use_new=True`"),
    "activated": (
        settings(alora_invocation_tokens=[1]),
        "alora_invocation_tokens=[1]",
    ),
    "quantized groups": (settings(use_qalora=True), "use_qalora"),
    "quantized start": (
        settings(init_lora_weights="loftq"),
        "a base that PEFT changed",
    ),
    "random start": (
        settings(init_lora_weights="pissa_niter_4"),
        "path_initial_model_for_weight_conversion",
    ),
    "replicated": (settings(layer_replication=[[0, 2]]), "layer_replication"),
    "parameters": (settings(target_parameters=["w"]), "target_parameters"),
    "tokens": (settings(trainable_token_indices=[1]), "trainable_token"),
    "biases": (settings(bias="all"), "biases of the base"),
    "rank of another kind": (settings(r="8"), "`r` of", "is '8'"),
    "no alpha": (settings(lora_alpha=0), "`lora_alpha` of"),
    "no expression": (settings(rank_pattern={"(": 2}), "does not parse"),
    "other rank": (settings(r=4), "`layers.0.self_attn.q_proj.lora_A.weight`"),
    "other targets": (
        settings(target_modules=["q_proj", "down_proj", "v_proj"]),
        "no tensors for `layers.0.self_attn.v_proj`",
        "no tensors for `layers.1.self_attn.v_proj`",
    ),
    "missing": (
        without(f"{Q}.lora_B.weight"),
        "missing `layers.0.self_attn.q_proj.lora_B.weight`",
    ),
    "missing module": (
        tensors(without_module),
        "no tensors for `layers.1.mlp.down_proj`",
    ),
    "no tensors": (tensors(dict.clear), "no tensors"),
    "transposed": (
        tensors(turned),
        "q_proj.lora_A.weight` has shape (16, 2), not (2, 16): it is",
        "down_proj.lora_B.weight` has shape (2, 16), not (16, 2): it is",
    ),
    "nan": (tensors(not_a_number), "holds NaN or infinity"),
    "bias of B": (put(f"{Q}.lora_B.bias", ONES), "without `lora_bias`"),
    "no bias of B": (
        settings(lora_bias=True),
        "missing `layers.1.mlp.down_proj.lora_B.bias`",
    ),
    "bias of DoRA": (
        settings(lora_bias=True, use_dora=True),
        "`lora_bias` and `use_dora` exclude each other",
    ),
    "bias of a layer without": (with_biases, "it has no bias"),
    "no magnitude": (settings(use_dora=True), "lora_magnitude_vector"),
    "another model": (
        tensors(another_model),
        "no module `model.layers.0.attention.wq`",
    ),
    "more layers": (
        tensors(more_layers),
        "no module `model.layers.7.mlp.down_proj`",
        "Did you mean",
    ),
    "quantized base": (
        put(f"{Q}.base_layer.weight", np.ones((128, 1), "uint8")),
        "is no weight of this base",
    ),
    "unknown tensor": (put(f"{Q}.lora_C", ONES), "lora_C"),
    "head elsewhere": (
        put("base_model.model.score.weight", np.ones((3, 16), "float32")),
        "`score.weight` of shape (3, 16) fits no weight",
    ),
    "output": (
        tensors(
            lambda found: found.update(
                {
                    "base_model.model.lm_head.lora_A.weight": np.ones(
                        (2, 16), "float32"
                    )
                }
            )
        ),
        "keras-hub keeps the output matrix",
    ),
}


@pytest.mark.parametrize(
    "damage, words",
    [pytest.param(row[0], row[1:], id=name) for name, row in BAD.items()],
)
def test_a_bad_folder(damage, words, saved, copy):
    damage(copy)
    model = ours("llama", saved[0])
    with refused(model, *words):
        keras_peft.load_adapter(model, copy)


def test_settings_that_are_off_are_accepted(saved, copy):
    settings(use_new=False, new_list=[], new_dict={}, new_name=None)(copy)
    keras_peft.load_adapter(ours("llama", saved[0]), copy)


@pytest.mark.filterwarnings("default")
def test_a_base_that_differs_is_told(saved, copy, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    config = {"rms_norm_eps": 1e-5, "quantization_config": {"bits": 4}}
    (base / "config.json").write_text(json.dumps(config))
    settings(base_model_name_or_path=str(base))(copy)
    model = ours("llama", saved[0])
    words = "`rms_norm_eps=1e-05` there, and 5 of 5.*base is quantized"
    with pytest.warns(UserWarning, match=words):
        keras_peft.load_adapter(model, copy)
    # Without a folder, what most models of the family have.
    settings(base_model_name_or_path="someone/llama")(copy)
    with pytest.warns(UserWarning, match="most models of this family"):
        keras_peft.load_adapter(ours("llama", saved[0]), copy)


def test_everything_wrong_is_in_one_message(saved, copy):
    tensors(turned)(copy)
    without(f"{DOWN}.lora_A.weight")(copy)
    settings(use_new=True)(copy)
    model = ours("llama", saved[0])
    with refused(model, "use_new", "q_proj.lora_A", "missing", "transposed"):
        keras_peft.load_adapter(model, copy)


def test_an_adapter_of_another_family(saved, peers):
    model = ours("gpt2", peers["gpt2"][1])
    with refused(model, "no module `model.layers.0.self_attn.q_proj`"):
        keras_peft.load_adapter(model, saved[1])


def test_one_use_of_a_tied_matrix(peers, tmp_path):
    model = ours("gemma", peers["gemma"][1])
    keras_peft.adapt(model, LoRA(2), targets="embeddings")
    randomize_ours(model)
    keras_peft.save_adapter(model, tmp_path / "tied", format="peft")
    for part in "AB":
        key = f"base_model.model.lm_head.lora_{part}.weight"
        without(key)(tmp_path / "tied")
    fresh = ours("gemma", peers["gemma"][1])
    with refused(fresh, "are one matrix in this model"):
        keras_peft.load_adapter(fresh, tmp_path / "tied")


def test_a_head_of_another_size(peers, tmp_path):
    model = ours("bert", peers["bert"][1])
    keras_peft.adapt(model, LoRA(2))
    keras_peft.save_adapter(model, tmp_path / "three", format="peft")
    put("base_model.model.classifier.weight", np.ones((5, 16), "float32"))(
        tmp_path / "three"
    )
    fresh = ours("bert", peers["bert"][1])
    with refused(fresh, "`classifier.weight` of shape (5, 16)"):
        keras_peft.load_adapter(fresh, tmp_path / "three")


# -- Writing -----------------------------------------------------------------


def unwritable(model, tmp_path, *words):
    with refused(model, *words):
        keras_peft.save_adapter(model, tmp_path / "bad", format="peft")
    assert not (tmp_path / "bad").exists()


def test_a_model_that_is_not_of_keras_hub(tmp_path):
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
    keras_peft.adapt(model, LoRA(2))
    unwritable(model, tmp_path, "holds no backbone", "format='keras'")


def test_a_family_without_a_converter(tmp_path):
    import keras_hub

    model = keras_hub.models.FNetBackbone(20, 1, 8, 8, max_sequence_length=6)
    keras_peft.adapt(model, LoRA(2), targets=r".*intermediate_dense")
    unwritable(model, tmp_path, "no converter", "Received: FNetBackbone")


def test_a_head_that_transformers_does_not_have(peers, tmp_path):
    backbone = ours("bert", peers["bert"][1]).backbone
    pooled = backbone(backbone.input)["pooled_output"]
    outputs = keras.layers.Dense(4, name="mine")(pooled)
    model = keras.Model(backbone.input, outputs)
    keras_peft.adapt(model, LoRA(2))
    unwritable(model, tmp_path, "the head's `mine/0.kernel` has no name")


def test_a_layer_that_is_no_module(peers, tmp_path):
    model = ours("vit", peers["vit"][1])
    keras_peft.adapt(model, LoRA(2), targets="position_embedding")
    unwritable(model, tmp_path, "position_embedding", "has no name there")


def test_a_method_that_peft_has_no_files_for(peers, tmp_path):
    model = ours("llama", peers["llama"][1])
    keras_peft.adapt(model, keras_peft.HRA(rank=2))
    unwritable(model, tmp_path, "HRA has no form", "to_lora")


def test_dora_on_a_tied_matrix(peers, tmp_path):
    model = ours("gemma", peers["gemma"][1])
    keras_peft.adapt(model, LoRA(2, decompose=True), targets="embeddings")
    unwritable(model, tmp_path, "is tied to the output")


@pytest.mark.parametrize("method", ["LoHa", "LoKr", "OFT"])
def test_a_fused_layer_in_methods_that_cannot_follow(method, peers, tmp_path):
    model = ours("gpt2", peers["gpt2"][1])
    kind = getattr(keras_peft, method)
    chosen = kind(block_size=4) if method == "OFT" else kind(rank=2)
    keras_peft.adapt(model, chosen, targets=["query", "key"])
    unwritable(model, tmp_path, "h.0.attn.c_attn")


def test_an_unknown_format(peers, tmp_path):
    model = ours("llama", peers["llama"][1])
    keras_peft.adapt(model, LoRA(2))
    with refused(model, "'keras' or 'peft'"):
        keras_peft.save_adapter(model, tmp_path / "bad", format="hf")
