"""A keras-hub tokenizer as a `tokenizer.json` that gives the same ids.

The tokenizer that ships has to be the one that trained. Tokenizers published
beside the original weights differ from keras-hub's in how they split, fold
case and treat rare characters, so nothing is copied from there: the file is
derived from the layer, and `tokenizer_check` compares the two.
"""

import functools
import unicodedata
from collections.abc import Iterable

import regex
import tokenizers
from keras_hub.tokenizers import BytePairTokenizer
from keras_hub.tokenizers import SentencePieceTokenizer
from keras_hub.tokenizers import Tokenizer
from keras_hub.tokenizers import WordPieceTokenizer
from tokenizers import Regex
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers

from keras_peft.export.sentence_piece import convert_sentence_piece

# Neither is left in a text once control characters have become `BREAK`.
BREAK = "\x1f"
FILLER = "\x1e"

# What keras-hub splits at, in the syntax of the `regex` package.
SPACES = r"[ \t\n\r\f]|\p{Cc}|\p{Cf}"
PUNCTUATION = r"[!-/:-@\[-`{-~]|\p{P}"
CJK = (
    r"[\u4E00-\u9FFF\u3400-\u4DBF\U00020000-\U0002A6DF"
    r"\U0002A700-\U0002B73F\U0002B740-\U0002B81F\U0002B820-\U0002CEAF"
    r"\uF900-\uFAFF\U0002F800-\U0002FA1F]"
)
# Code points that case folding drops (Unicode's Default_Ignorable).
IGNORABLE = (
    r"[\x{AD}\x{34F}\x{61C}\x{115F}\x{1160}\x{17B4}\x{17B5}\x{180B}-\x{180F}"
    r"\x{200B}-\x{200F}\x{202A}-\x{202E}\x{2060}-\x{206F}\x{3164}"
    r"\x{FE00}-\x{FE0F}\x{FEFF}\x{FFA0}\x{FFF0}-\x{FFF8}"
    r"\x{1BCA0}-\x{1BCA3}\x{1D173}-\x{1D17A}\x{E0000}-\x{E0FFF}]"
)
# keras-hub and TensorFlow Text map longer words to the unknown token.
MAX_BYTES_PER_WORD = 100


def convert_tokenizer(layer: Tokenizer) -> tokenizers.Tokenizer | None:
    """`layer` without Keras, or `None` where no exact form is known.

    Special tokens are not matched in the text unless keras-hub matches them:
    a user who types `[SEP]` must not end the sentence.
    """
    if isinstance(layer, WordPieceTokenizer):
        return _word_piece(layer)
    if isinstance(layer, BytePairTokenizer):
        return _byte_pair(layer)
    if isinstance(layer, SentencePieceTokenizer):
        return convert_sentence_piece(layer)
    return None


def _byte_pair(layer: BytePairTokenizer) -> tokenizers.Tokenizer:
    """The very object that keras-hub runs, special tokens included."""
    # Private (checked on keras-hub 0.32): rebuilding it from the vocabulary
    # would lose what each family changes in normalizer and splitting.
    layer._maybe_initialized_tokenizers()
    return tokenizers.Tokenizer.from_str(layer._tokenizer.to_str())


def _word_piece(layer: WordPieceTokenizer) -> tokenizers.Tokenizer | None:
    if not layer.split:
        return None
    vocabulary = layer.get_vocabulary()
    result = tokenizers.Tokenizer(
        models.WordPiece(
            vocab={token: id for id, token in enumerate(vocabulary)},
            unk_token=layer.oov_token,
            continuing_subword_prefix=layer.suffix_indicator,
            max_input_chars_per_word=MAX_BYTES_PER_WORD,
        )
    )
    result.normalizer = normalizers.Sequence(_word_piece_steps(layer))
    result.pre_tokenizer = pre_tokenizers.Split(BREAK, behavior="removed")
    result.decoder = decoders.WordPiece(
        prefix=layer.suffix_indicator, cleanup=False
    )
    if layer.special_tokens_in_strings:
        special = layer.special_tokens + list(layer._init_special_tokens or [])
        result.add_special_tokens(sorted(set(special)))
    return result


def _word_piece_steps(
    layer: WordPieceTokenizer,
) -> list[normalizers.Normalizer]:
    """keras-hub's order: accents, then words, then case, word by word.

    Case is folded after the split, because folding makes new punctuation:
    `…` is one word that becomes `...`, not three words. A tokenizer file
    splits last, so the normalizer marks the breaks between words itself.
    """
    steps = []
    if layer.strip_accents:
        steps += [normalizers.NFD(), _replace(_accents(), "")]
    alone = _members(
        f"{PUNCTUATION}|{CJK}" if layer.split_on_cjk else PUNCTUATION
    )
    steps += [
        _replace(_members(SPACES) + "+", BREAK),
        # Never at the start of a text: inserting there panics (tokenizers
        # 0.23).
        _replace(f"(?<={alone})(?=.)|(?<=.)(?={alone})", BREAK),
    ]
    if layer.lowercase:
        steps += _case_folding(frozenset("".join(layer.get_vocabulary())))
    return steps + _unknown_long_words()


@functools.lru_cache
def _members(pattern: str) -> str:
    """A character class that lists what `pattern` matches, code by code.

    Written out, the file gives the same ids under every version of Unicode
    that a runtime may know.
    """
    everything = "".join(map(chr, range(0x110000)))
    found = regex.finditer(f"(?:{pattern})+", everything)
    return _character_class((match.start(), match.end() - 1) for match in found)


@functools.lru_cache
def _accents() -> str:
    marks = [c for c in range(0x110000) if unicodedata.category(chr(c)) == "Mn"]
    return _character_class((code, code) for code in marks)


def _character_class(ranges: Iterable[tuple[int, int]]) -> str:
    spans = [f"\\x{{{first:X}}}-\\x{{{last:X}}}" for first, last in ranges]
    return f"[{''.join(spans)}]"


def _case_folding(
    characters: frozenset[str],
) -> list[normalizers.Normalizer]:
    """Unicode's NFKC_Casefold, as far as the vocabulary can tell."""
    steps = [normalizers.NFKC(), normalizers.Lowercase(), normalizers.NFKC()]
    for folded, sources in _folds_missing_in(steps, characters).items():
        steps.append(_replace(f"[{sources}]", folded))
    return steps + [normalizers.NFKC(), _replace(IGNORABLE, "")]


def _folds_missing_in(
    steps: list[normalizers.Normalizer], characters: frozenset[str]
) -> dict[str, str]:
    """Characters that `steps` leave unfolded: `{"ss": "ß", "σ": "ς"}`.

    Lower case is not case folding, and the two sides know different versions
    of Unicode. A character that appears in no token makes its word unknown
    however it is folded, so only folds that touch `characters` are listed.
    """
    letters = [
        letter for letter in map(chr, range(0x110000)) if _is_text(letter)
    ]
    lowered = normalizers.Sequence(steps).normalize_str("\n".join(letters))
    folds: dict[str, str] = {}
    for letter, lower in zip(letters, lowered.split("\n"), strict=True):
        folded = _case_fold(letter)
        known = lower in characters or characters.issuperset(folded)
        if folded == lower or len(lower) != 1 or not known:
            continue
        if lower not in folds.setdefault(folded, ""):
            folds[folded] += lower
    return folds


def _is_text(letter: str) -> bool:
    return unicodedata.category(letter) not in ("Cc", "Cf", "Cn", "Co", "Cs")


def _case_fold(letter: str) -> str:
    folded = unicodedata.normalize("NFKC", letter).casefold()
    return unicodedata.normalize("NFKC", folded)


def _unknown_long_words() -> list[normalizers.Normalizer]:
    """Makes words of more than 100 bytes unknown, as keras-hub does.

    A tokenizer file limits characters, not bytes: a Thai sentence of 40
    letters passes there. Fillers raise the number of characters of a word to
    its number of bytes, so that one regular expression can measure it.
    """
    at_word_start = f"(?<![^{BREAK}])"
    too_long = f"{at_word_start}[^{BREAK}]{{{MAX_BYTES_PER_WORD + 1},}}"
    return [
        _replace(r"(?<=[\x{80}-\x{10FFFF}])", FILLER),
        _replace(r"(?<=[\x{800}-\x{10FFFF}])" + FILLER, FILLER * 2),
        _replace(r"(?<=[\x{10000}-\x{10FFFF}])" + FILLER, FILLER * 2),
        _replace(too_long, "\x00" * (MAX_BYTES_PER_WORD + 1)),
        normalizers.Replace(FILLER, ""),
    ]


def _replace(pattern: str, content: str) -> normalizers.Normalizer:
    return normalizers.Replace(Regex(pattern), content)


def special_tokens(layer: Tokenizer) -> dict[str, dict[str, str | int]]:
    """Text and id by role: `{"pad": {"token": "[PAD]", "id": 0}}`."""
    found: dict[str, dict[str, str | int]] = {}
    for role in ("start", "end", "pad", "mask", "unk"):
        token = getattr(layer, f"{role}_token", None)
        id = getattr(layer, f"{role}_token_id", None)
        if token is not None and id is not None:
            found[role] = {"token": str(token), "id": int(id)}
    return found
