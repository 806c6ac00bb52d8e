"""The tokenizer of a language model, in files that onnxruntime-genai reads.

The tokenizer that ships is the tokenizer that trained: the files are made from
the live one, and what the runtime's own tokenizer makes of them is compared
with it, id by id, before anything is written.
"""

import dataclasses
import json
import shutil
import tempfile
import unicodedata
from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from keras_hub.tokenizers import SentencePieceTokenizer
from keras_hub.tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from keras_peft.export.genai.tokenizer_form import NoRuntimeForm
from keras_peft.export.genai.tokenizer_form import normalization
from keras_peft.export.genai.tokenizer_form import runtime_form
from keras_peft.export.sentence_piece import UNSEEN
from keras_peft.export.tokenizer import convert_tokenizer
from keras_peft.export.tokenizer_check import TEXTS
from keras_peft.export.tokenizer_check import around
from keras_peft.export.tokenizer_check import differing_lines
from keras_peft.hf_chat import read_chat_template

TEMPLATE = "chat_template.jinja"
CHAT = (
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "Why?\nSay it in   one line."},
)


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """What the files of a tokenizer say.

    Attributes:
        end_ids: Ids that end a text; generation stops at any of them.
        pad_id: The id that fills a batch of prompts.
        start_id: The id that starts a text, or `None` if there is none.
        add_bos: Whether training put `start_id` in front of every text. The
            runtime does so with the option `add_special_tokens="true"` of
            its tokenizer, and by itself adds nothing. A chat needs no option:
            the template writes the token.
        chat_template: The template of chats, or `None`.
        normalization: `"NFC"` if texts have to be brought into this form
            before they are encoded, which the runtime does not do, or `None`.
        checked: The number of texts that were compared.
    """

    end_ids: tuple[int, ...]
    pad_id: int
    start_id: int | None = None
    add_bos: bool = False
    chat_template: str | None = None
    normalization: str | None = None
    checked: int = 0


@dataclasses.dataclass(frozen=True)
class _Trained:
    """A tokenizer as a model was trained with it."""

    name: str
    tokenizer: tokenizers.Tokenizer
    encode: Callable[[Sequence[str]], list[list[int]]]
    files: TokenizerFiles


def write_tokenizer(
    trained: Any,
    folder: str | Path,
    hf_folder: str | Path | None = None,
    texts: Sequence[str] = (),
) -> TokenizerFiles:
    """Writes the tokenizer that `trained` was trained with.

    Compared are prose in many scripts, source code, white space, emoji and
    special tokens, `texts`, and one chat if there is a template.

    Args:
        trained: A keras-hub model, its preprocessor or tokenizer, or a
            tokenizer of `tokenizers` or `transformers`.
        folder: Where to write `tokenizer.json`, `tokenizer_config.json` and
            `chat_template.jinja`.
        hf_folder: The Hugging Face folder that the model comes from: its chat
            template and its end tokens are taken over.
        texts: Lines of the user's own to compare on.

    Raises:
        ValueError: If the runtime would make other ids of a text than
            training did. Nothing is written then.
    """
    source = _read(trained, hf_folder)
    texts = [*TEXTS, *around(_typed(source.tokenizer)), *texts]
    with tempfile.TemporaryDirectory() as staging:
        _write(source, Path(staging))
        texts = _check_ids(source, Path(staging), texts)
        if source.files.chat_template:
            _check_chat(source, Path(staging))
        Path(folder).mkdir(parents=True, exist_ok=True)
        for file in Path(staging).iterdir():
            if file.name != "genai_config.json":
                shutil.copy(file, folder)
    return dataclasses.replace(source.files, checked=len(texts))


# -- Reading -----------------------------------------------------------------


def _read(trained: Any, hf_folder: str | Path | None) -> _Trained:
    trained = getattr(trained, "preprocessor", None) or trained
    theirs = _hf_settings(hf_folder)
    layer = getattr(trained, "tokenizer", trained)
    if isinstance(layer, Tokenizer):
        return _read_layer(trained, layer, theirs)
    tokenizer = getattr(trained, "backend_tokenizer", trained)
    if isinstance(tokenizer, tokenizers.Tokenizer):
        return _read_hf(trained, tokenizer, theirs)
    raise TypeError(
        "Expected a keras-hub model, preprocessor or tokenizer, or a "
        "tokenizer of `tokenizers` or `transformers`. "
        f"Received: trained={trained!r} of type {type(trained).__name__}"
    )


def _hf_settings(folder: str | Path | None) -> dict[str, Any]:
    """End, start and padding ids and the template of a folder."""
    if folder is None:
        return {}
    found: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        path = Path(folder) / name
        if path.is_file():
            read = json.loads(path.read_text("utf-8"))
            known = {key: read.get(key) for key in _IDS}
            found |= {k: v for k, v in known.items() if v is not None}
    return found | {_CHAT: read_chat_template(folder)}


_CHAT = "chat_template"
_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")


def _read_layer(
    trained: Any, layer: Tokenizer, theirs: dict[str, Any]
) -> _Trained:
    name = type(layer).__name__
    tokenizer = convert_tokenizer(layer)
    if tokenizer is None:
        raise ValueError(_no_form(name, "it has no form outside of Keras"))
    start = getattr(layer, "start_token_id", None)
    ends = [layer.end_token_id, getattr(layer, "end_token2_id", None)]
    adds = trained is not layer and getattr(trained, "add_start_token", True)
    adds = adds and start is not None
    template = getattr(layer, _CHAT, None)
    files = TokenizerFiles(
        end_ids=_ids(*ends, theirs.get("eos_token_id")),
        pad_id=int(getattr(layer, "pad_token_id", None) or 0),
        start_id=start,
        add_bos=adds,
        chat_template=_starting(template or theirs.get(_CHAT), adds),
        normalization=normalization(tokenizer),
    )
    if isinstance(layer, SentencePieceTokenizer):
        _add_control_pieces(tokenizer, files)
    front = [] if start is None or not files.add_bos else [start]

    def encode(texts: Sequence[str]) -> list[list[int]]:
        rows = layer(list(texts))
        return [front + [int(id) for id in row] for row in rows]

    return _Trained(name, tokenizer, encode, files)


def _starting(template: str | None, adds: bool) -> str | None:
    """The template with the token that keras-hub puts before every text."""
    if template is None or not adds or "bos_token" in template:
        return template
    return "{{- bos_token -}}" + template


def _add_control_pieces(
    tokenizer: tokenizers.Tokenizer, files: TokenizerFiles
) -> None:
    """Makes pieces like `</s>` special, which no text contains.

    Their names end in a letter that is none, since keras-hub does not match
    them in a text: a user who types `</s>` does not end it.
    """
    ids = {*files.end_ids, files.pad_id, files.start_id}
    tokenizer.add_special_tokens(
        [tokenizer.id_to_token(id) for id in ids if id is not None]
    )


def _read_hf(
    trained: Any, tokenizer: tokenizers.Tokenizer, theirs: dict[str, Any]
) -> _Trained:
    name = type(trained).__name__
    ends = _ids(getattr(trained, "eos_token_id", None), theirs.get(_IDS[0]))
    if not ends:
        raise ValueError(
            "A tokenizer alone does not say which token ends a text. Pass "
            "`hf_folder`, the folder of the model, with `config.json`. "
            f"Received: hf_folder=None, trained={name}"
        )
    front = _front(tokenizer, name)
    pad = getattr(trained, "pad_token_id", None)
    files = TokenizerFiles(
        end_ids=ends,
        pad_id=theirs.get("pad_token_id", ends[0]) if pad is None else pad,
        start_id=front[0] if front else theirs.get("bos_token_id"),
        add_bos=bool(front),
        chat_template=getattr(trained, _CHAT, None) or theirs.get(_CHAT),
        normalization=normalization(tokenizer),
    )
    # A copy: padding and truncation belong to the user's object.
    plain = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    plain.no_padding()
    plain.no_truncation()

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [line.ids for line in plain.encode_batch(list(texts))]

    return _Trained(name, plain, encode, files)


def _front(tokenizer: tokenizers.Tokenizer, name: str) -> list[int]:
    """What a tokenizer puts before every text; refuses anything more."""
    framed = tokenizer.encode("a").ids
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    if framed[-len(bare) :] != bare or len(framed) > len(bare) + 1:
        reason = f"it frames a text as {framed}, and only one token in front "
        raise ValueError(_no_form(name, reason + "can be added"))
    return framed[: -len(bare)]


def _ids(*found: int | Sequence[int] | None) -> tuple[int, ...]:
    """Ids without doubles, in the order of the arguments."""
    flat: dict[int, None] = {}
    for each in found:
        ids = [each] if isinstance(each, int | np.integer) else each or []
        flat |= {int(id): None for id in ids}
    return tuple(flat)


def _added(tokenizer: tokenizers.Tokenizer) -> list[str]:
    added = tokenizer.get_added_tokens_decoder().values()
    return [token.content for token in added]


def _typed(tokenizer: tokenizers.Tokenizer) -> list[str]:
    """The added tokens as a user would type them."""
    return [token.removesuffix(UNSEEN) for token in _added(tokenizer)]


# -- Writing -----------------------------------------------------------------


def _write(source: _Trained, folder: Path) -> None:
    try:
        file = runtime_form(source.tokenizer)
    except NoRuntimeForm as error:
        raise ValueError(_no_form(source.name, str(error))) from None
    files, name_of = source.files, source.tokenizer.id_to_token
    special = set(_added(source.tokenizer))
    names: dict[str, Any] = {"eos_token": name_of(files.end_ids[0])}
    if files.start_id is not None:
        names["bos_token"] = name_of(files.start_id)
    # keras-hub pads with the id 0, whatever token that is.
    if name_of(files.pad_id) in special:
        names["pad_token"] = name_of(files.pad_id)
    if files.add_bos:
        file["post_processor"] = _bos_first(names["bos_token"], files)
    _dump(file, folder / "tokenizer.json")
    # The class by which other readers take `tokenizer.json` as it is.
    config = names | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": files.add_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    _dump(config, folder / "tokenizer_config.json")
    if files.chat_template:
        (folder / TEMPLATE).write_text(files.chat_template, "utf-8")


def _bos_first(token: str, files: TokenizerFiles) -> dict[str, Any]:
    processor = TemplateProcessing(
        single=[token, "$A"],
        pair=[token, "$A", "$B:1"],
        special_tokens=[(token, files.start_id)],
    )
    found: dict[str, Any] = json.loads(processor.__getstate__())
    return found


def _dump(value: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), "utf-8")


# -- Checking ----------------------------------------------------------------


def _check_ids(
    source: _Trained, folder: Path, texts: Sequence[str]
) -> list[str]:
    """Compares training, the runtime and `tokenizers`; returns the texts."""
    # The runtime's interface ends a text at its first NUL.
    texts = [text.replace("\0", "") for text in texts]
    if source.files.normalization == "NFC":
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    expected = {"token_ids": _rows(source.encode(texts))}
    own = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    readers = {
        "onnxruntime-genai": _encode(source, folder, texts),
        "`tokenizers`": [line.ids for line in own.encode_batch(texts)],
    }
    for reader, rows in readers.items():
        found = {"token_ids": _rows(rows)}
        lines = differing_lines(texts, expected, found, _name(source))
        if lines:
            raise ValueError(_differs(source.name, reader, lines, len(texts)))
    return texts


def _encode(source: _Trained, folder: Path, texts: Sequence[str]) -> list[Any]:
    try:
        runtime = _runtime(source, folder)
        runtime.update_options(add_special_tokens="true")
        return [runtime.encode(text) for text in texts]
    except RuntimeError as error:
        # Such as an expression that is none of `std::regex`.
        reason = f"its tokenizer fails on them, with {str(error)!r}"
        raise ValueError(_no_form(source.name, reason)) from None


def _rows(rows: Sequence[Any]) -> list[np.ndarray]:
    return [np.asarray(row, "int64").reshape(-1) for row in rows]


def _name(source: _Trained) -> Callable[[int], str]:
    return lambda id: source.tokenizer.id_to_token(id) or f"<{id}>"


def _runtime(source: _Trained, folder: Path) -> Any:
    """The tokenizer of onnxruntime-genai, which loads with any model's."""
    import onnxruntime_genai

    model = {
        "type": "decoder",
        "context_length": 1,
        "vocab_size": source.tokenizer.get_vocab_size(),
        "decoder": {"filename": "model.onnx", "head_size": 1},
    }
    _dump({"model": model}, folder / "genai_config.json")
    config = onnxruntime_genai.Config(str(folder))
    return onnxruntime_genai.Tokenizer(config)


def _check_chat(source: _Trained, folder: Path) -> None:
    """Renders a chat in the runtime: not every template works there."""
    try:
        _runtime(source, folder).apply_chat_template(json.dumps(CHAT))
    except Exception as error:
        raise ValueError(
            "onnxruntime-genai cannot apply the chat template: "
            f"{error}\nSimplify it, or leave out `hf_folder` and write "
            f"prompts in the application. Received: {source.name}"
        ) from None


def _no_form(name: str, reason: str) -> str:
    return (
        f"onnxruntime-genai cannot compute the ids of `{name}`: {reason}. A "
        "model must run on the ids it was trained on. Train it with a "
        "tokenizer of byte-level byte pairs, or of SentencePiece byte pairs "
        f"without normalization. Received: {name}"
    )


def _differs(name: str, reader: str, lines: list[str], total: int) -> str:
    return (
        f"The tokenizer files made from `{name}` do not give the ids of "
        f"training in {reader}: {len(lines)} of {total} lines differ. A model "
        "must run on the ids it was trained on.\n"
        + "\n".join(lines[:5])
        + f"\nReceived: {name}"
    )
