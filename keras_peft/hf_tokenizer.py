"""The tokenizer of a Hugging Face folder, as one of keras-hub's."""

import json
from pathlib import Path
from typing import Any

import keras
import tokenizers
from keras_hub.tokenizers import BytePairTokenizer
from keras_hub.tokenizers import MistralTekkenTokenizer

from keras_peft.hf_chat import read_chat_template

FILE = "tokenizer.json"


# The class of keras-hub that runs an object of `tokenizers`, in pipelines of
# `tf.data` too. Checked on keras-hub 0.32.
@keras.saving.register_keras_serializable(package="keras_peft")
class HuggingFaceTokenizer(MistralTekkenTokenizer):
    """A tokenizer that makes the ids of a Hugging Face `tokenizer.json`.

    keras-hub rebuilds a tokenizer from its vocabulary and splits a text in its
    own way. This one runs the file itself: the same ids for every text, on
    every backend, in lists and in `tf.data`. It stands wherever a tokenizer
    of keras-hub stands, and is saved with the model.
    `keras_peft.check_base(model, hf_folder, mend=True)` puts it there.

    Args:
        tokenizer: A tokenizer of `tokenizers`, or the text of its file. `None`
            leaves it to `load_assets`.
        special: `{"end_token": "</s>"}`: tokens by what keras-hub calls them;
            `"end_token"` and, if a text starts with one, `"start_token"` among
            them.
        pad_token_id: Integer, what fills a batch. Not an end token: keras-hub
            stops to generate where it sees one.
        chat_template: The template by which chats become texts, for users and
            for export. Nothing applies it by itself.
    """

    backbone_cls = None

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer | str | None = None,
        special: dict[str, str] | None = None,
        pad_token_id: int = 0,
        chat_template: str | None = None,
        **kwargs: Any,
    ):
        self.special = dict(special or {})
        self.chat_template = chat_template
        self.split_pattern = None
        # keras-hub frames a text with neither of them.
        self.start_token = self.start_token_id = None
        self.pad_token_id = pad_token_id
        for name, token in self.special.items():
            self._add_special_token(token, name)
        # Not the class above, which asks for tokens of Mistral.
        BytePairTokenizer.__init__(self, **kwargs)
        self.file_assets = [FILE]
        if tokenizer is not None:
            self.set_tokenizer(tokenizer)

    def set_tokenizer(self, tokenizer: tokenizers.Tokenizer | str) -> None:
        """Runs `tokenizer` from now on, without framing and padding."""
        text = tokenizer if isinstance(tokenizer, str) else tokenizer.to_str()
        file = json.loads(text)
        file |= {"post_processor": None, "truncation": None, "padding": None}
        found = tokenizers.Tokenizer.from_str(json.dumps(file))
        self._tokenizer = found
        self.vocabulary = found.get_vocab()
        self.merges: list[str] = []
        self._update_special_token_ids()

    def _maybe_initialized_tokenizers(self) -> None:
        self._check_vocabulary()

    def save_assets(self, dir_path: str) -> None:
        self._check_vocabulary()
        (Path(dir_path) / FILE).write_text(self._tokenizer.to_str(), "utf-8")

    def load_assets(self, dir_path: str) -> None:
        self.set_tokenizer((Path(dir_path) / FILE).read_text("utf-8"))

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        for name in ("split_pattern", "add_prefix_space"):
            del config[name]
        return config | {
            "special": dict(self.special),
            "pad_token_id": self.pad_token_id,
            "chat_template": self.chat_template,
        }


def of_folder(
    folder: Path, keep: dict[str, str], pad_id: int, frames: bool
) -> HuggingFaceTokenizer | None:
    """The tokenizer of a Hugging Face folder; `None` if it has no file.

    Args:
        folder: With `tokenizer.json`, and what else says which tokens frame
            and end a text.
        keep: Special tokens to carry over, as keras-hub names them.
        pad_id: What pads a text, if the folder names no token for it, or an
            end token.
        frames: Whether the tokens that start and end a text are among `keep`.
            Else they are the folder's.
    """
    if not (folder / FILE).is_file():
        return None
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / FILE))
    known = tokenizer.get_vocab()
    special = {name: token for name, token in keep.items() if token in known}
    if not frames:
        for name in ("start_token", "end_token", "end_token2", "pad_token"):
            special.pop(name, None)
        special |= framing(folder, tokenizer)
        pad_id = _padding(folder, tokenizer, pad_id, special)
    template = read_chat_template(folder)
    return HuggingFaceTokenizer(tokenizer, special, pad_id, template)


def framing(folder: Path, tokenizer: tokenizers.Tokenizer) -> dict[str, str]:
    """Which tokens start and end a text, by the names of keras-hub."""
    config = _read(folder / "tokenizer_config.json")
    ends = [_content(config.get("eos_token")), *_ends(folder, tokenizer)]
    unique = dict.fromkeys(end for end in ends if end)
    names = ("end_token", "end_token2")  # keras-hub knows no third.
    found = dict(zip(names, unique, strict=False))
    framed = tokenizer.encode("a")
    bare = tokenizer.encode("a", add_special_tokens=False)
    if len(framed.ids) > len(bare.ids):
        found["start_token"] = framed.tokens[0]
    return found


def _padding(
    folder: Path,
    tokenizer: tokenizers.Tokenizer,
    pad_id: int,
    special: dict[str, str],
) -> int:
    ends = {special.get("end_token"), special.get("end_token2")}
    token = _content(_read(folder / "tokenizer_config.json").get("pad_token"))
    theirs = None
    if token is not None and token not in ends:
        theirs = tokenizer.token_to_id(token)
    choices = [theirs, pad_id, 0, 1, 2]
    return next(
        id
        for id in choices
        if id is not None and tokenizer.id_to_token(id) not in ends
    )


def _ends(folder: Path, tokenizer: tokenizers.Tokenizer) -> list[str | None]:
    """What generation stops at, which may be more than the end of a text."""
    for name in ("generation_config.json", "config.json"):
        ids = _read(folder / name).get("eos_token_id")
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            return [tokenizer.id_to_token(id) for id in ids]
    return []


def _content(token: str | dict[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found
