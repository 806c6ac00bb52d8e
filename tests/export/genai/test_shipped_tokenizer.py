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


def test_what_frames_and_ends_a_text_is_returned(tmp_path):
    trained = preprocessor("Llama3")
    layer = trained.tokenizer
    files = write_tokenizer(trained, tmp_path)
    ends = (layer.end_token_id, layer.end_token2_id)
    assert files.end_ids == ends and len(set(ends)) == 2
    assert (files.start_id, files.add_bos) == (layer.start_token_id, True)
    trained.add_start_token = False
    assert not write_tokenizer(trained, tmp_path).add_bos
    assert not write_tokenizer(layer, tmp_path).add_bos


def test_a_chat_starts_as_a_text_of_training(tmp_path):
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    trained = preprocessor("Llama")
    write_tokenizer(trained, tmp_path / "out", tmp_path)
    reader = runtime(tmp_path / "out")
    reader.update_options(add_special_tokens="false")
    chat = [{"role": "user", "content": "What is 2 + 2?"}]
    text = "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n"
    fed = trained.generate_preprocess([text], sequence_length=64)
    expected = np.asarray(fed["token_ids"])[np.asarray(fed["padding_mask"])]
    # The runtime writes the name of the start token, and so its id.
    prompt = reader.apply_chat_template(json.dumps(chat))
    assert reader.encode(prompt).tolist() == expected.tolist()


def test_long_words_do_not_end_the_process(tmp_path):
    trained = hub_tokenizer("GPT2")
    write_tokenizer(trained, tmp_path)
    text = "漢字" * 20_000
    ids = runtime(tmp_path).encode(text)
    assert runtime(tmp_path).decode(ids) == text


def test_a_mark_that_composes_letters_is_left_to_the_application(tmp_path):
    trained = byte_pairs("qwen")
    trained.normalizer = tokenizers.normalizers.NFC()
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"eos_token_id": 0}))
    files = write_tokenizer(trained, tmp_path / "out", tmp_path)
    assert files.normalization == "NFC"
    text = "Café"
    assert runtime(tmp_path / "out").encode(text).tolist() == (
        trained.encode("Cafe\u0301").ids
    )


def lower_case(tokenizer):
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()


def spaced(tokenizer):
    level = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.pre_tokenizer = level


def at_punctuation(tokenizer):
    split = pre_tokenizers.Punctuation()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, NO_SPLIT])


def by_letters(tokenizer):
    """An expression that `std::regex` takes for one of bytes."""
    tokenizer.pre_tokenizer = by_expression(r"[a-zé]+|[^a-zé]+")


def ended(tokenizer):
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 4)]
    )


@pytest.mark.parametrize(
    "change, words",
    [
        (lower_case, "normalizes a text first"),
        (spaced, "splits a text in a way"),
        (at_punctuation, "Punctuation"),
        (by_letters, "its tokenizer fails"),
        (ended, "frames a text"),
    ],
)
def test_what_the_runtime_cannot_compute_is_refused(change, words, tmp_path):
    trained = byte_pairs("gpt2")
    change(trained)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"eos_token_id": 0}))
    with pytest.raises(ValueError, match=f"(?s){words}.*Received: Tokenizer"):
        write_tokenizer(trained, tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()


def test_pieces_cut_out_of_a_text_with_a_space_in_front_are_refused(tmp_path):
    proto = sentence_piece(user_defined_symbols=["<|user|>"])
    layer = keras_hub.models.LlamaTokenizer(proto)
    with pytest.raises(ValueError, match=r"(?s)lines differ.*<\|user\|>"):
        write_tokenizer(layer, tmp_path)


def test_a_unigram_model_is_refused(tmp_path):
    trained = tokenizers.Tokenizer(models.Unigram([("a", 0.0)], 0))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    with pytest.raises(ValueError, match="its model is `Unigram`"):
        write_tokenizer(trained, tmp_path / "out", tmp_path)


def test_a_template_that_the_runtime_cannot_render_is_refused(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{% for m in %}")
    with pytest.raises(ValueError, match="cannot apply the chat template"):
        write_tokenizer(hub_tokenizer("GPT2"), tmp_path / "out", tmp_path)


def test_an_end_must_be_known(tmp_path):
    with pytest.raises(ValueError, match="Pass `hf_folder`"):
        write_tokenizer(byte_pairs("gpt2"), tmp_path)
    with pytest.raises(TypeError, match="Received: trained=None"):
        write_tokenizer(None, tmp_path)
