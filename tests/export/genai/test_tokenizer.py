"""The runtime makes the ids of a text that training made."""

import functools
import io
import json

import keras_hub
import numpy as np
import onnxruntime_genai
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import trainers

from keras_peft.export.genai.tokenizer import write_tokenizer
from keras_peft.export.tokenizer_check import TEXTS

GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
NO_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
SPECIAL += ["<pad>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "<|im_end|>\n{% endfor %}"
)


def by_expression(expression):
    split = pre_tokenizers.Split(tokenizers.Regex(expression), "isolated")
    return pre_tokenizers.Sequence([split, NO_SPLIT])


SPLITS = {
    "gpt2": GPT2,
    "smollm2": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), GPT2]
    ),
    "llama3": by_expression(LLAMA3),
    "qwen": by_expression(QWEN),
}


@functools.cache
def trained_byte_pairs(name):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = SPLITS[name]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXTS] * 3, trainer)
    return tokenizer.to_str()


def byte_pairs(name):
    """A tokenizer whose merges come from the corpus it is tested on."""
    return tokenizers.Tokenizer.from_str(trained_byte_pairs(name))


def vocabulary(tokenizer):
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [" ".join(pair) for pair in model["merges"]]


def sentence_piece(**options):
    """A model such as Llama 2's: byte pairs, bytes, nothing normalized."""
    file = io.BytesIO()
    options = {"bos_piece": "<s>", "eos_piece": "</s>"} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in TEXTS if text] * 3),
        model_writer=file,
        vocab_size=900,
        model_type="BPE",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        max_sentence_length=100_000,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        **options,
    )
    return file.getvalue()


def gemma():
    """No mark in front; the turns of a chat are pieces of their own."""
    turns = ["<start_of_turn>", "<end_of_turn>"]
    return sentence_piece(
        bos_piece="<bos>",
        eos_piece="<eos>",
        add_dummy_prefix=False,
        user_defined_symbols=turns,
    )


HUB = {
    "GPT2": "gpt2",
    "Llama3": "llama3",
    "Qwen": "qwen",
    "Qwen3": "smollm2",
    "OPT": "gpt2",
    "Bloom": "gpt2",
    "Falcon": "gpt2",
    "GPTNeoX": "gpt2",
}
PIECES = {
    "Llama": sentence_piece,
    "Mistral": sentence_piece,
    "Gemma": gemma,
    "Phi3": lambda: sentence_piece(eos_piece="<|endoftext|>"),
}


def hub_tokenizer(name):
    make = getattr(keras_hub.models, f"{name}Tokenizer")
    if name in PIECES:
        return make(PIECES[name]())
    vocab, merges = vocabulary(byte_pairs(HUB[name]))
    return make(vocabulary=vocab, merges=merges)


def preprocessor(name):
    make = getattr(keras_hub.models, f"{name}CausalLMPreprocessor")
    return make(hub_tokenizer(name), sequence_length=4096)


def runtime(folder):
    """onnxruntime-genai's own tokenizer, which adds a start if asked to."""
    model = {"type": "llama", "context_length": 8, "vocab_size": 8}
    model["decoder"] = {"filename": "model.onnx", "head_size": 8}
    path = folder / "genai_config.json"
    path.write_text(json.dumps({"model": model}))
    config = onnxruntime_genai.Config(str(folder))
    found = onnxruntime_genai.Tokenizer(config)
    found.update_options(add_special_tokens="true")
    return found


def soup(tokenizer, count=300):
    """Texts of random tokens: merges that meet in no ordinary text."""
    rng = np.random.default_rng(0)
    rows = rng.integers(tokenizer.get_vocab_size(), size=(count, 12))
    return [
        text.replace("\0", "")
        for text in tokenizer.decode_batch(rows.tolist())
        if "�" not in text
    ]


@pytest.mark.parametrize("name", [*HUB, *PIECES])
def test_the_runtime_reads_what_keras_hub_trained_on(name, tmp_path):
    trained = preprocessor(name)
    write_tokenizer(trained, tmp_path)
    reader = runtime(tmp_path)
    own = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = [text.replace("\0", "") for text in TEXTS] + soup(own)
    fed = trained.generate_preprocess(texts)
    for text, ids, mask in zip(
        texts, fed["token_ids"], fed["padding_mask"], strict=True
    ):
        expected = np.asarray(ids)[np.asarray(mask, bool)].tolist()
        if len(expected) < 4096:
            assert reader.encode(text).tolist() == expected, text
            assert own.encode(text).ids == expected, text


@pytest.mark.parametrize("name", SPLITS)
def test_the_runtime_reads_what_hugging_face_trained_on(name, tmp_path):
    trained = byte_pairs(name)
    config = {"eos_token_id": [2, 0], "pad_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    files = write_tokenizer(trained, tmp_path / "out", tmp_path)
    assert (files.end_ids, files.pad_id, files.add_bos) == ((2, 0), 1, False)
    reader = runtime(tmp_path / "out")
    for text in [*TEXTS, *soup(trained)]:
        text = text.replace("\0", "")
        assert reader.encode(text).tolist() == trained.encode(text).ids, text
