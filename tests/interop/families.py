"""Tiny random Hugging Face models, one row per family that keras-hub reads."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

VOCABULARY = 40
TOKENS = 7


@dataclasses.dataclass(frozen=True)
class Family:
    """How to make a tiny model of one family on both sides.

    Activations are those that keras-hub hard-codes, and epsilons those it
    keeps, so that the two models differ by rounding alone.
    """

    config: str  # Of transformers.
    settings: dict[str, Any]
    peer: str  # Auto class of transformers.
    model: str  # Class of keras-hub.
    attention: tuple[str, ...]  # Modules, as PEFT targets them.
    mlp: tuple[str, ...]
    image: bool = False
    conv1d: bool = False

    @property
    def causal(self):
        return self.peer == "AutoModelForCausalLM"


_SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=24,
    max_position_embeddings=32,
    tie_word_embeddings=False,
)
DECODER = _SIZES | dict(num_key_value_heads=2)
_GEMMA = DECODER | dict(head_dim=8, tie_word_embeddings=True)
ENCODER = _SIZES | dict(
    hidden_act="gelu_pytorch_tanh",
    type_vocab_size=2,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    layer_norm_eps=1e-12,
    pad_token_id=1,
)
_ROBERTA = ENCODER | dict(
    type_vocab_size=1, layer_norm_eps=1e-5, hidden_act="gelu"
)
IMAGE = dict(
    image_size=16,
    patch_size=4,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=24,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")
_SELF = ("query", "key", "value")


def _decoder(config, settings, model, **kwargs):
    return Family(
        config,
        settings,
        "AutoModelForCausalLM",
        f"{model}CausalLM",
        _QKVO,
        _GATED,
        **kwargs,
    )


FAMILIES = {
    "bert": Family(
        "BertConfig",
        ENCODER,
        "AutoModelForSequenceClassification",
        "BertTextClassifier",
        _SELF,
        ("intermediate.dense", "output.dense"),
    ),
    "roberta": Family(
        "RobertaConfig",
        _ROBERTA,
        "AutoModelForSequenceClassification",
        "RobertaTextClassifier",
        _SELF,
        ("intermediate.dense", "output.dense"),
    ),
    "xlm-roberta": Family(
        "XLMRobertaConfig",
        _ROBERTA,
        "AutoModelForSequenceClassification",
        "XLMRobertaTextClassifier",
        _SELF,
        ("intermediate.dense", "output.dense"),
    ),
    "distilbert": Family(
        "DistilBertConfig",
        dict(
            vocab_size=VOCABULARY,
            dim=16,
            n_layers=2,
            n_heads=4,
            hidden_dim=24,
            max_position_embeddings=32,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
            activation="gelu",
        ),
        "AutoModelForSequenceClassification",
        "DistilBertTextClassifier",
        ("q_lin", "k_lin", "v_lin", "out_lin"),
        ("lin1", "lin2"),
    ),
    "albert": Family(
        "AlbertConfig",
        ENCODER | dict(embedding_size=8, num_hidden_groups=1),
        "AutoModelForSequenceClassification",
        "AlbertTextClassifier",
        _SELF,
        ("ffn", "ffn_output"),
    ),
    "bart": Family(
        "BartConfig",
        dict(
            vocab_size=VOCABULARY,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=32,
            dropout=0.0,
            activation_function="gelu",
        ),
        "AutoModelForSeq2SeqLM",
        "BartSeq2SeqLM",
        ("q_proj", "k_proj", "v_proj", "out_proj"),
        ("fc1", "fc2"),
    ),
    "gpt2": Family(
        "GPT2Config",
        dict(
            vocab_size=VOCABULARY,
            n_embd=16,
            n_layer=2,
            n_head=4,
            n_positions=32,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
        "AutoModelForCausalLM",
        "GPT2CausalLM",
        ("c_attn", "attn.c_proj"),
        ("c_fc", "mlp.c_proj"),
        conv1d=True,
    ),
    "llama": _decoder("LlamaConfig", DECODER, "Llama3"),
    "mistral": _decoder(
        "MistralConfig", DECODER | dict(sliding_window=32), "Mistral"
    ),
    "qwen2": _decoder(
        "Qwen2Config",
        DECODER | dict(use_sliding_window=False, sliding_window=32),
        "Qwen",
    ),
    "qwen3": _decoder(
        "Qwen3Config",
        DECODER | dict(head_dim=8, sliding_window=None),
        "Qwen3",
    ),
    "smollm3": _decoder(
        "SmolLM3Config",
        DECODER
        | dict(
            no_rope_layers=[1, 1],
            tie_word_embeddings=True,
            pad_token_id=0,
        ),
        "SmolLM3",
    ),
    "gemma": _decoder("GemmaConfig", _GEMMA, "Gemma"),
    "gemma2": _decoder(
        "Gemma2Config",
        _GEMMA | dict(query_pre_attn_scalar=8, sliding_window=32),
        "Gemma",
    ),
    "gemma3": _decoder(
        "Gemma3TextConfig",
        _GEMMA | dict(query_pre_attn_scalar=8, sliding_window=32),
        "Gemma3",
    ),
    "vit": Family(
        "ViTConfig",
        IMAGE,
        "AutoModelForImageClassification",
        "ViTImageClassifier",
        _QKVO,
        ("fc1", "fc2"),
        image=True,
    ),
    "dinov2": Family(
        "Dinov2Config",
        IMAGE | dict(mlp_ratio=2),
        "AutoModel",
        "DINOV2Backbone",
        _QKVO,
        ("fc1", "fc2"),
        image=True,
    ),
    "dinov3": Family(
        "DINOv3ViTConfig",
        IMAGE,
        "AutoModel",
        "DINOV3Backbone",
        _QKVO,
        ("up_proj", "down_proj"),
        image=True,
    ),
}


# One of each kind of layout, which stand for the others.
CORE = ("bert", "gpt2", "llama", "gemma", "vit")


def rows(names, table, first):
    """`(name, row)` of all pairs; `slow` but for a core of families.

    The `first` row of `table` is run for every family.
    """
    return [
        pytest.param(
            name,
            row,
            id=f"{name}-{key}",
            marks=[pytest.mark.slow] * (key != first and name not in CORE),
        )
        for name in names
        for key, row in table.items()
    ]


def peer(name, folder):
    """A random transformers model of the family, also saved to `folder`."""
    import torch
    import transformers

    family = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**family.settings)
    if "Classification" in family.peer:
        config.num_labels = 3
    model = getattr(transformers, family.peer).from_config(config).eval()
    for parameter in model.parameters():
        # Random, so that no weight is zero or one.
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
        # keras-hub rounds Mistral's weights to float16.
        parameter.data = parameter.data.half().float()
    if name == "roberta":
        # Zero in every checkpoint, and left out by keras-hub.
        model.roberta.embeddings.token_type_embeddings.weight.data *= 0.0
    model.save_pretrained(folder)
    if name == "bart":
        # Written by older versions of transformers, and read by keras-hub.
        path = Path(folder) / "config.json"
        text = json.loads(path.read_text()) | {"num_hidden_layers": 2}
        path.write_text(json.dumps(text))
    return model


def ours(name, folder):
    """The keras-hub model with the weights of a folder."""
    import keras_hub

    family = FAMILIES[name]
    kind = getattr(keras_hub.models, family.model)
    if issubclass(kind, keras_hub.models.Backbone):
        return kind.from_preset(str(folder))
    backbone = kind.backbone_cls.from_preset(str(folder))
    classes = {"num_classes": 3} if "Classifier" in family.model else {}
    if "Text" in family.model:
        classes["dropout"] = 0.0
    return kind(backbone=backbone, preprocessor=None, **classes)


def copy_head(base, model):
    """Gives a classifier its peer's head, which keras-hub may not read."""
    state = {key: value.numpy() for key, value in base.state_dict().items()}
    for module, attribute in (
        ("classifier", "output_dense"),
        ("pre_classifier", "pooled_dense"),
        ("classifier.dense", "pooled_dense"),
        ("classifier.out_proj", "output_dense"),
    ):
        if f"{module}.weight" in state:
            weights = state[f"{module}.weight"].T, state[f"{module}.bias"]
            getattr(model, attribute).set_weights(weights)


def inputs(name):
    """`{name: array}` for the peer."""
    rng = np.random.default_rng(3)
    if FAMILIES[name].image:
        images = rng.normal(size=(2, 3, 16, 16))
        return {"pixel_values": images.astype("float32")}
    tokens = rng.integers(5, VOCABULARY, (2, TOKENS))
    found = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    if name == "bart":
        found["decoder_input_ids"] = rng.integers(5, VOCABULARY, (2, 5))
    return found


def of_peer(model, arrays):
    """What a transformers or PEFT model computes for `arrays`."""
    import torch

    tensors = {key: torch.tensor(value) for key, value in arrays.items()}
    with torch.no_grad():
        found = model(**tensors)
    logits = getattr(found, "logits", None)
    found = found.last_hidden_state if logits is None else logits
    return found.float().numpy()


def of_ours(model, arrays):
    """The same of a Keras model."""
    if "pixel_values" in arrays:
        images = np.moveaxis(arrays["pixel_values"], 1, -1)
        named = isinstance(model.input, dict)
        given = dict.fromkeys(model.input, images) if named else images
    else:
        tokens = arrays["input_ids"].astype("int32")
        mask = arrays["attention_mask"].astype("bool")
        given = {
            "token_ids": tokens,
            "padding_mask": mask,
            "segment_ids": np.zeros_like(tokens),
            "encoder_token_ids": tokens,
            "encoder_padding_mask": mask,
        }
        if "decoder_input_ids" in arrays:
            target = arrays["decoder_input_ids"].astype("int32")
            given["decoder_token_ids"] = target
            given["decoder_padding_mask"] = np.ones_like(target, "bool")
        given = {i.name: given[i.name] for i in model.inputs}
    found = model(given, training=False)
    if isinstance(found, dict):
        key = "decoder_sequence_output"
        found = found.get(key, found.get("sequence_output"))
    return keras.ops.convert_to_numpy(found).astype("float32")
