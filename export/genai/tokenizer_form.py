"""A tokenizer in the form that onnxruntime-genai computes with.

The runtime reads the vocabulary, the merges and the added tokens of a
`tokenizer.json`, and only some of its steps: no normalizer but the space mark
of SentencePiece, expressions that it knows by their text, and else those of
`std::regex` on bytes. What is said here in other words gives the same ids;
what cannot be said is refused.
"""

import json
import re
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import tokenizers

from keras_peft.export.sentence_piece import SPACE
from keras_peft.export.sentence_piece import UNSEEN

# The letter of the byte 0xFF, which is in no text.
NO_BYTE = "ÿ"
GPT2 = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
    r"|\s+(?!\S)|\s+"
)
# The runtime's expressions recurse once per byte: 30 kB without a space
# overflow the stack. No word is cut within a character: U+0080 to U+00BF are
# the bytes that continue one.
WORD = "{1,1000}(?![\\u0080-\\u00BF])"
# To readers that see letters U+00A0 is one: they need the rest.
REST = r"|[\s\S]"
# Where a text may be cut if no token reaches over the cut: before the first
# blank after a word, before a space, before a space that no line break
# follows.
CUTS = (
    rf"\s{{0,1000}}[^\s]{WORD}|\s{{1,1000}}{REST}",
    rf" {{0,1000}}[^ ]{WORD}| {{1,1000}}{REST}",
    rf" {{0,1000}}[^ ]{WORD}(?: {{1,1000}}[\r\n][^ ]{{0,250}})*"
    rf"| {{1,1000}}{REST}",
)


class NoRuntimeForm(Exception):
    """Says what of a tokenizer the runtime cannot compute."""


def runtime_form(tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """The `tokenizer.json` of `tokenizer` for onnxruntime-genai.

    Raises:
        NoRuntimeForm: If a step of the tokenizer is none of the runtime's.
    """
    file: dict[str, Any] = json.loads(tokenizer.to_str())
    file |= {"truncation": None, "padding": None, "post_processor": None}
    if file["model"]["type"] != "BPE":
        raise NoRuntimeForm(
            f"its model is `{file['model']['type']}`, and the runtime "
            "computes the ids of a language model by byte pairs alone"
        )
    byte_level = _is_byte_level(file)
    _hide_unmerged(file, tokenizer, NO_BYTE if byte_level else UNSEEN)
    return _byte_level(file) if byte_level else _space_marked(file)


def _hide_unmerged(
    file: dict[str, Any], tokenizer: tokenizers.Tokenizer, mark: str
) -> None:
    """Renames tokens that no merge makes, such as unused special ones.

    The runtime looks a whole piece of a text up before it merges, and would
    find them in a text where training did not.
    """
    if file["model"].get("ignore_merges"):
        return
    vocab, merge = file["model"]["vocab"], tokenizer.model.tokenize
    kept = {token["content"] for token in file["added_tokens"]}
    kept.add(file["model"]["unk_token"])
    kept.update(f"<0x{byte:02X}>" for byte in range(256))
    for left, right in file["model"]["merges"]:
        kept |= {left, right, left + right}
    file["model"]["vocab"] = {
        token
        if token in kept or _ids(merge(token)) == [id]
        else token + mark: id
        for token, id in vocab.items()
    }


def _ids(tokens: list[tokenizers.Token]) -> list[int]:
    return [token.id for token in tokens]


def normalization(tokenizer: tokenizers.Tokenizer) -> str | None:
    """`"NFC"` if the tokenizer composes letters first, else `None`.

    The runtime has no such step. Keyboards and most files give composed
    letters anyhow; an application that cannot be sure has to compose them.
    """
    kinds = {step["type"] for step in _steps(tokenizer, "normalizer")}
    return "NFC" if kinds == {"NFC"} else None


def _steps(tokenizer: tokenizers.Tokenizer, part: str) -> list[dict[str, Any]]:
    return list(_flat(json.loads(tokenizer.to_str())[part]))


def _flat(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps of a sequence, of a sequence in it, or of one step."""
    if step is None:
        return
    if step["type"] != "Sequence":
        yield step
        return
    for part in ("normalizers", "pretokenizers", "decoders"):
        for each in step.get(part, []):
            yield from _flat(each)


def _is_byte_level(file: dict[str, Any]) -> bool:
    kinds = [step["type"] for step in _flat(file["pre_tokenizer"])]
    return "ByteLevel" in kinds


# -- Byte-level byte pairs ---------------------------------------------------


def _byte_level(file: dict[str, Any]) -> dict[str, Any]:
    composes = [step["type"] for step in _flat(file["normalizer"])] == ["NFC"]
    if file["normalizer"] and not composes:
        raise NoRuntimeForm(
            "it normalizes a text first, and the runtime does not: "
            f"{file['normalizer']['type']}"
        )
    expressions = [
        expression
        for step in _flat(file["pre_tokenizer"])
        for expression in _expressions(step)
    ]
    splits = [_split(each, "Isolated") for each in expressions]
    if not splits:
        splits = [_split(_cut(_byte_tokens(file)), "Contiguous")]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    steps = {"type": "Sequence", "pretokenizers": [*splits, byte_level]}
    return file | {"pre_tokenizer": steps}


def _expressions(step: dict[str, Any]) -> Iterator[str]:
    """What a pre-tokenizer splits by, if the runtime can split so."""
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        if step["use_regex"]:
            yield GPT2
    elif kind == "Digits" and step["individual_digits"]:
        yield r"\p{N}"
    elif kind == "Split" and "Regex" in step["pattern"] and _isolates(step):
        yield step["pattern"]["Regex"]
    elif kind == "Split" and _is_in_no_text(step["pattern"].get("String")):
        return
    else:
        raise NoRuntimeForm(
            "it splits a text in a way that the runtime does not have: "
            f"{json.dumps(step, ensure_ascii=False)}"
        )


def _isolates(step: dict[str, Any]) -> bool:
    return step["behavior"] == "Isolated" and not step["invert"]


def _is_in_no_text(literal: str | None) -> bool:
    """Whether this is an expression that was passed as a plain string.

    keras-hub 0.32 passes Llama 3's so: it is looked for letter by letter, and
    a text is never split.
    """
    return literal is not None and r"\p{" in literal


def _byte_tokens(file: dict[str, Any]) -> Iterator[str]:
    """The bytes of each token, one letter per byte."""
    letters = _byte_letters()
    for token in file["model"]["vocab"]:
        yield "".join(letters.get(letter, letter) for letter in token)


def _byte_letters() -> dict[str, str]:
    """The letter that byte-level vocabularies write for each byte."""
    shown = (*range(33, 127), *range(161, 173), *range(174, 256))
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {chr(byte): chr(byte) for byte in shown}
    return letters | {chr(256 + i): chr(b) for i, b in enumerate(hidden)}


# -- SentencePiece byte pairs ------------------------------------------------


def _space_marked(file: dict[str, Any]) -> dict[str, Any]:
    """Byte pairs over a text whose spaces have become `▁`."""
    steps = [*_flat(file["normalizer"]), *_flat(file["pre_tokenizer"])]
    prefixed = False
    for step in steps:
        prefixed = _prefixes(step) or prefixed
    tokens = (token.replace(SPACE, " ") for token in file["model"]["vocab"])
    # The runtime takes its mark in front of a text for a letter.
    cuts = CUTS[1:] if prefixed else CUTS
    mark = _replace(" ", SPACE)
    decoders = [_replace(SPACE, " "), *_kinds("ByteFallback", "Fuse")]
    if prefixed:
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        decoders.append(strip)
    prepend = [{"type": "Prepend", "prepend": SPACE}] if prefixed else []
    return file | {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, mark]},
        "pre_tokenizer": _split(_cut(tokens, cuts), "Contiguous"),
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def _prefixes(step: dict[str, Any]) -> bool:
    """Whether a step puts a space mark in front; refuses all other steps."""
    kind = step["type"]
    if kind == "Prepend" and step["prepend"] == SPACE:
        return True
    if kind == "Metaspace" and not step.get("split", True):
        return step.get("prepend_scheme") in ("first", "always")
    marks = kind == "Replace" and step["content"] == SPACE
    # Every space is a mark by then, so this splits nothing.
    idle = kind == "Split" and step["pattern"] == {"String": " "}
    if marks and step["pattern"] == {"String": " "} or idle:
        return False
    if kind == "Metaspace":
        raise NoRuntimeForm("it splits at spaces that tokens reach over")
    raise NoRuntimeForm(
        "it changes or splits a text in a way that the runtime does not "
        f"have: {kind}"
    )


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _kinds(*names: str) -> list[dict[str, Any]]:
    return [{"type": name} for name in names]


# -- Cuts --------------------------------------------------------------------


def _cut(tokens: Iterator[str], cuts: Sequence[str] = CUTS) -> str:
    """An expression for pieces of a text that no token reaches over.

    Merging whole texts takes the runtime a time that grows with the square of
    their length, and it always splits. Splitting where no token reaches over
    leaves every merge as it is.
    """
    found = list(tokens)
    for cut in cuts:
        pattern = re.compile(cut, re.ASCII)
        if all(_is_whole(pattern, token) for token in found):
            return cut
    raise NoRuntimeForm(
        "it does not split a text, and its tokens reach over every place "
        "where the runtime could"
    )


def _is_whole(pattern: re.Pattern[str], token: str) -> bool:
    found = pattern.match(token)
    return not token or (found is not None and found.end() == len(token))


def _split(expression: str, behavior: str) -> dict[str, Any]:
    """A step that the runtime takes by its expression alone.

    `Contiguous` joins what is matched one after the other again: other
    readers of the file do not split, as in training.
    """
    return {
        "type": "Split",
        "pattern": {"Regex": expression},
        "behavior": behavior,
        "invert": False,
    }
