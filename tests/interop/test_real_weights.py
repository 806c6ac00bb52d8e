"""Real weights: the same outputs, and the same training, as in PEFT."""

import keras
import keras_hub
import numpy as np
import peft
import pytest
import torch
import transformers
from families import of_ours
from families import of_peer
from test_peft_lora import QUIET
from test_peft_lora import randomize
from weights import minilm
from weights import smollm2

import keras_peft
from keras_peft import LoRA
from keras_peft import adapter_state

pytestmark = [*QUIET, pytest.mark.slow]

STEPS = 50


def tokens(count, length, vocabulary, seed=0):
    """Sequences that repeat a random phrase: something to learn."""
    rng = np.random.default_rng(seed)
    phrases = rng.integers(100, vocabulary, (count, 8))
    return np.tile(phrases, (1, length // 8))


@pytest.fixture(scope="module")
def language_models():
    """`(transformers model, Keras model)` of SmolLM2, equal bases."""
    folder = smollm2()
    causal = transformers.AutoModelForCausalLM
    peer = causal.from_pretrained(folder, dtype=torch.float32).eval()
    # keras-hub drops `rms_norm_eps`; as the model is built it can be given.
    backbone = keras_hub.models.Llama3Backbone.from_preset(
        str(folder), layer_norm_epsilon=1e-5
    )
    assert keras_peft.check_base(backbone, folder) == []
    model = keras_hub.models.Llama3CausalLM(
        backbone=backbone, preprocessor=None
    )
    return peer, model


def agree(found, expected):
    # Thirty layers of float32 products; the bases themselves differ by 2e-5.
    limit = 1e-4 * np.abs(expected).max()
    assert np.abs(found - expected).max() <= limit


def test_a_language_model_both_ways(language_models, tmp_path):
    peer, model = language_models
    ids = tokens(2, 32, peer.config.vocab_size)
    arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    agree(of_ours(model, arrays), of_peer(peer, arrays))
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj", "down_proj"],
        use_dora=True,
        r=8,
    )
    tuned = peft.get_peft_model(peer, config).eval()
    try:
        randomize(tuned, scale=0.02)
        expected = of_peer(tuned, arrays)
        tuned.save_pretrained(tmp_path / "theirs")
    finally:
        tuned.unload()
    keras_peft.load_adapter(model, tmp_path / "theirs")
    try:
        agree(of_ours(model, arrays), expected)
        keras_peft.save_adapter(model, tmp_path / "ours", format="peft")
    finally:
        keras_peft.remove(model)
    tuned = peft.PeftModel.from_pretrained(peer, tmp_path / "ours").eval()
    try:
        agree(of_peer(tuned, arrays), expected)
    finally:
        tuned.unload()


def test_an_encoder_both_ways(tmp_path):
    folder = minilm()
    model = keras_hub.models.BertBackbone.from_preset(str(folder))
    (dropped,) = [
        told
        for told in keras_peft.check_base(model, folder)
        if "activation" in told or "hidden_act" in told
    ]
    assert "'gelu'" in dropped
    # As keras-hub computes it.
    peer = transformers.AutoModel.from_pretrained(
        folder, hidden_act="gelu_pytorch_tanh"
    ).eval()
    ids = tokens(2, 16, peer.config.vocab_size)
    arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    agree(of_ours(model, arrays), of_peer(peer, arrays))
    keras_peft.adapt(model, LoRA(rank=4, alpha=8))
    rng = np.random.default_rng(0)
    for leaf in adapter_state.leaves(model, "default").values():
        for variable in leaf.learned:
            noise = rng.normal(scale=0.02, size=variable.shape)
            variable.assign(noise.astype("float32"))
    found = of_ours(model, arrays)
    keras_peft.save_adapter(model, tmp_path / "ours", format="peft")
    tuned = peft.PeftModel.from_pretrained(peer, tmp_path / "ours").eval()
    agree(of_peer(tuned, arrays), found)


CONFIGS = {
    "lora": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=8
    ),
    "dora": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj"],
        r=8,
        use_dora=True,
    ),
    "ia3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
    "prompt": lambda: peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=4,
        # Of another size than words, the prompt would drown the text.
        prompt_tuning_init="SAMPLE_VOCAB",
    ),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_the_same_training(method, language_models, tmp_path):
    """Same start, data, optimizer: the same loss at each of 50 steps."""
    peer, model = language_models
    ids = tokens(2 * STEPS, 32, peer.config.vocab_size).reshape(STEPS, 2, 32)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(peer, CONFIGS[method]())
    try:
        tuned.save_pretrained(tmp_path / "start")
        expected = train_peer(tuned, ids, RATES[method])
    finally:
        if method != "prompt":  # Which stands outside of the model.
            tuned.unload()
    keras_peft.load_adapter(model, tmp_path / "start", trainable=True)
    try:
        found = train_ours(model, ids, RATES[method])
    finally:
        keras_peft.remove(model)
    assert np.mean(expected[-10:]) < np.mean(expected[:10]) - 0.5
    # Losses of 3 to 7 that differ by 1e-4 from the first step on: thirty layers
    # of float32 in another order.
    assert np.abs(np.array(found) - expected).max() <= 1e-3, (found, expected)


# Where losses jump between steps, rounding grows: rates below that.
RATES = {"lora": 5e-4, "dora": 2e-4, "ia3": 5e-4, "prompt": 1e-3}
DECAY = 0.01
# torch adds it after the correction of the moments' bias and Keras before, so
# that in the first steps a larger one is not the same optimizer.
EPSILON = 1e-12


def train_peer(model, ids, rate):
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        learned, lr=rate, weight_decay=DECAY, eps=EPSILON
    )
    losses = []
    for batch in torch.tensor(ids):
        # Behind the tokens that a prompt puts in front.
        logits = model(input_ids=batch).logits[:, -batch.shape[1] : -1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_ours(model, ids, rate):
    model.compile(
        optimizer=keras.optimizers.AdamW(
            rate, weight_decay=DECAY, epsilon=EPSILON
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[],
    )
    losses = []
    for batch in ids.astype("int32"):
        inputs = {
            "token_ids": batch[:, :-1],
            "padding_mask": np.ones_like(batch[:, :-1], "bool"),
        }
        loss = model.train_on_batch(inputs, batch[:, 1:])
        losses.append(float(np.ravel(loss)[0]))
    return losses
