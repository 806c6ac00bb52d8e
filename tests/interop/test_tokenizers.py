"""The tokenizer of a Hugging Face folder, in place of keras-hub's."""

import json
import subprocess
import sys
import warnings

import keras
import keras_hub
import numpy as np
import pytest
import tokenizers
from families import ours
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import trainers

import keras_peft
from keras_peft import LoRA
from keras_peft.export.tokenizer_check import TEXTS

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CODE = "def f(x):\n    return  x ** 12\n"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What stands beside the weights: SmolLM2's kind of tokenizer."""
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=SPECIAL,
        initial_alphabet=level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXTS] * 3, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "chat_template": TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    settings = {"model_type": "llama", "rms_norm_eps": 1e-5, "eos_token_id": 2}
    (path / "config.json").write_text(json.dumps(settings))
    return path


def language_model(folder):
    """A small Llama 3 that reads as keras-hub does."""
    file = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokenizer = keras_hub.models.Llama3Tokenizer(
        file["vocab"],
        [" ".join(pair) for pair in file["merges"]],
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        misc_special_tokens=set(SPECIAL),
    )
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=len(file["vocab"]),
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=12,
    )
    preprocessor = keras_hub.models.Llama3CausalLMPreprocessor(
        tokenizer, sequence_length=24
    )
    return keras_hub.models.Llama3CausalLM(backbone, preprocessor)


def ids_of(folder, text):
    file = str(folder / "tokenizer.json")
    return tokenizers.Tokenizer.from_file(file).encode(text).ids


def read(model, text):
    fed = model.preprocessor.generate_preprocess([text])
    mask = np.asarray(fed["padding_mask"][0], bool)
    return np.asarray(fed["token_ids"][0])[mask].tolist()


def test_all_that_differs_is_told_and_mended(folder):
    model = language_model(folder)
    assert read(model, CODE) != ids_of(folder, CODE)
    told = keras_peft.check_base(model, folder)
    words = ("rms_norm_eps", "other ids", "start_token_id", "chat template")
    assert len(told) == len(words)
    assert all(map(str.__contains__, told, words))
    mended = keras_peft.check_base(model, folder, mend=True)
    assert all(map(str.startswith, mended, told))
    assert keras_peft.check_base(model, folder) == []
    assert read(model, CODE) == ids_of(folder, CODE)
    assert model.preprocessor.tokenizer.chat_template == TEMPLATE
    assert model.backbone.get_config()["layer_norm_epsilon"] == 1e-5


def test_nothing_is_mended_unasked(folder):
    model = language_model(folder)
    before, preprocessor = read(model, CODE), model.preprocessor
    keras_peft.check_base(model, folder)
    assert model.preprocessor is preprocessor and read(model, CODE) == before


def test_padding_is_not_an_end(folder):
    # `pad_token` is `eos_token` there: `generate` would stop at once.
    model = language_model(folder)
    keras_peft.check_base(model, folder, mend=True)
    layer = model.preprocessor.tokenizer
    assert (layer.end_token_id, layer.pad_token_id) == (2, 0)


def test_a_mended_model_trains_and_answers(folder):
    model = language_model(folder)
    keras_peft.check_base(model, folder, mend=True)
    keras_peft.adapt(model, LoRA(2))
    model.compile("adam", "sparse_categorical_crossentropy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of Keras, on shuffling.
        model.fit([CODE, "a b"], batch_size=2, verbose=0)
    answer = model.generate("a b", max_length=8)
    assert isinstance(answer, str) and answer.startswith("a b")


def test_pipelines_of_tf_data_see_the_same_ids(folder):
    tf = pytest.importorskip("tensorflow")
    model = language_model(folder)
    keras_peft.check_base(model, folder, mend=True)
    texts = tf.data.Dataset.from_tensor_slices([CODE]).batch(1)
    (fed, _, _) = next(iter(texts.map(model.preprocessor)))
    ids = ids_of(folder, CODE)
    assert fed["token_ids"].numpy()[0][: len(ids)].tolist() == ids


SAVED = """
import sys
import keras
import keras_peft
tokenizer = keras.saving.load_model(sys.argv[1]).preprocessor.tokenizer
print(tokenizer([sys.argv[2]])[0], tokenizer.chat_template)
"""


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_saved_model_reads_as_before(folder, tmp_path):
    model = language_model(folder)
    keras_peft.check_base(model, folder, mend=True)
    model.save(tmp_path / "model.keras")
    found = subprocess.run(
        [sys.executable, "-c", SAVED, tmp_path / "model.keras", CODE],
        capture_output=True,
        text=True,
        check=True,
    )
    last = found.stdout.strip().split("\n")[-1]
    assert last == f"{ids_of(folder, CODE)} {TEMPLATE}"


def test_a_preset_keeps_the_tokenizer(folder, tmp_path):
    model = language_model(folder)
    keras_peft.check_base(model, folder, mend=True)
    model.preprocessor.save_to_preset(str(tmp_path))
    kind = keras_hub.models.Llama3CausalLMPreprocessor
    model.backbone.save_to_preset(str(tmp_path))
    loaded = kind.from_preset(str(tmp_path))
    assert loaded.tokenizer([CODE]) == [ids_of(folder, CODE)]


def test_training_with_another_tokenizer_is_warned_of(folder):
    model = language_model(folder)
    with pytest.warns(UserWarning, match=r"check_base\(.*mend=True"):
        keras_peft.adapt(model, LoRA(2))
    model = language_model(folder)
    keras_peft.check_base(model, folder, mend=True)
    keras_peft.adapt(model, LoRA(2))  # Warnings are errors here.


def test_accents_are_mended(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cafe", "café"]
    tokenizer = keras_hub.models.BertTokenizer(words, lowercase=True)
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(
        tokenizer, sequence_length=8
    )
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=7,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=8,
        max_sequence_length=8,
    )
    model = keras_hub.models.BertTextClassifier(
        backbone, num_classes=2, preprocessor=preprocessor
    )
    settings = {"model_type": "bert", "hidden_act": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = {"do_lower_case": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    activation, accents = keras_peft.check_base(model, tmp_path, mend=True)
    assert "a `.keras` file does not keep" in activation
    assert "strip_accents=True" in accents and accents.endswith("; mended")
    assert keras_peft.check_base(model, tmp_path) == []
    assert tokenizer(["Café"]) == [[words.index("cafe")]]
    kept = keras.layers.deserialize(keras.layers.serialize(tokenizer))
    assert kept.strip_accents is True


@pytest.mark.parametrize("name", ["bert", "qwen3", "vit"])
def test_mended_settings_make_the_outputs_of_transformers(
    name, peers, tmp_path
):
    """The activation, and epsilons that keras-hub fixes in code."""
    peer, folder = peers[name]
    model = ours(name, folder)
    keras_peft.check_base(model, folder, mend=True)
    told = keras_peft.check_base(model, folder)
    assert not any("norms" in each or "function" in each for each in told)
