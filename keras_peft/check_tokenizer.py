"""Whether a tokenizer of keras-hub makes the ids of a Hugging Face one."""

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras

from keras_peft import layer_tree
from keras_peft.finding import Finding
from keras_peft.hf_chat import read_chat_template

_FRAMING = ("start_token_id", "end_token_id", "pad_token_id")


def compare_tokenizer(
    model: keras.Model, folder: str | Path
) -> Iterator[Finding]:
    """What the tokenizer of `model` does otherwise than that of a folder."""
    folder = Path(folder)
    preprocessor = getattr(model, "preprocessor", None)
    layer = getattr(preprocessor, "tokenizer", None)
    replace = _replacement(model, folder)
    accents = _accents(layer, folder)
    if accents:
        yield accents
    if replace:
        yield from _compare_ids(layer, replace, bool(accents))
    elif _splits_nothing(layer):
        yield Finding(
            "there is no `tokenizer.json` to compare the tokenizer with, "
            "which does not split a text before it merges byte pairs"
        )
    template = read_chat_template(folder)
    if template and getattr(layer, "chat_template", None) != template:
        yield Finding(
            "there is a chat template, which keras-hub does not apply: write "
            "prompts in its form",
            replace,
            "the tokenizer carries it as `chat_template`",
        )


def _accents(layer: Any, folder: Path) -> Finding | None:
    config = _json(folder / "tokenizer_config.json")
    told = config.get("strip_accents")
    strips = bool(config.get("do_lower_case")) if told is None else told
    if getattr(layer, "strip_accents", None) is not False or not strips:
        return None
    return Finding(
        "the tokenizer there strips accents and this one does not: load it "
        "with `strip_accents=True`",
        lambda: setattr(layer, "strip_accents", True),
    )


def _compare_ids(
    layer: Any, replace: "_Replacement", accents: bool
) -> Iterator[Finding]:
    theirs = replace.tokenizer
    with _stripping(layer, accents):
        texts, apart = _apart(layer, theirs)
    if apart:
        yield Finding(
            f"the tokenizer there gives other ids for {len(apart)} of "
            f"{len(texts)} texts, such as {apart[0][:40]!r}",
            replace,
        )
    for name in _FRAMING:
        ours = getattr(layer, name, None)
        wanted = getattr(theirs, name, None)
        if ours != wanted:
            yield Finding(
                f"`{name}` there is {_named(theirs, wanted)}, and here "
                f"{_named(layer, ours)}",
                replace,
            )


@contextlib.contextmanager
def _stripping(layer: Any, accents: bool) -> Iterator[None]:
    """Compares as if accents, told of already, were mended."""
    if accents:
        layer.strip_accents = True
    try:
        yield
    finally:
        if accents:
            layer.strip_accents = False


def _apart(layer: Any, theirs: Any) -> tuple[list[str], list[str]]:
    """All texts that are compared, and those with other ids."""
    from keras_peft.export.tokenizer_check import TEXTS
    from keras_peft.export.tokenizer_check import around

    added = theirs._tokenizer.get_added_tokens_decoder().values()
    texts = [*TEXTS, *around([token.content for token in added])]
    rows = zip(texts, _rows(layer, texts), _rows(theirs, texts), strict=True)
    return texts, [text for text, ours, wanted in rows if ours != wanted]


def _rows(layer: Any, texts: list[str]) -> list[list[int]]:
    return [[int(id) for id in row] for row in layer(texts)]


def _named(layer: Any, id: int | None) -> str:
    return "none" if id is None else f"{id} ({layer.id_to_token(id)!r})"


class _Replacement:
    """Puts the folder's tokenizer in place of a model's, once."""

    def __init__(self, model: keras.Model, tokenizer: Any):
        self.model = model
        self.tokenizer = tokenizer

    def __call__(self) -> None:
        old = self.model.preprocessor
        if old.tokenizer is self.tokenizer:
            return
        config = old.get_config() | {"tokenizer": self.tokenizer}
        new = type(old).from_config(config)
        layer_tree.replace_child(self.model, "preprocessor", new)


def _replacement(model: keras.Model, folder: Path) -> _Replacement | None:
    """`None` if the folder has no tokenizer that could stand in the model."""
    preprocessor = getattr(model, "preprocessor", None)
    layer = getattr(preprocessor, "tokenizer", None)
    others = ("image_converter", "audio_converter", "video_converter")
    if layer is None or any(
        getattr(preprocessor, name, None) is not None for name in others
    ):
        return None
    from keras_peft.hf_tokenizer import of_folder

    named = getattr(layer, "_special_token_attrs", [])
    special = {name: getattr(layer, name) for name in named}
    # Only where a text goes on is the frame the folder's own.
    frames = not hasattr(preprocessor, "generate_preprocess")
    pad_id = int(getattr(layer, "pad_token_id", None) or 0)
    tokenizer = of_folder(folder, special, pad_id, frames)
    return tokenizer and _Replacement(model, tokenizer)


def warn_of_tokenizer(model: keras.Layer) -> None:
    """Warns where training would not see the ids of pretraining."""
    layer = getattr(getattr(model, "preprocessor", None), "tokenizer", None)
    if _splits_nothing(layer):
        warnings.warn(
            f"`{type(layer).__name__}` gives other ids than the model was "
            "pretrained with, on most source code and some prose: keras-hub "
            "does not split a text before it merges byte pairs, and splits "
            "otherwise in pipelines of `tf.data`. Before training, "
            "`keras_peft.check_base(model, hf_folder, mend=True)` puts the "
            "tokenizer of a Hugging Face folder in its place.",
            stacklevel=3,
        )


def _splits_nothing(layer: Any) -> bool:
    """Whether keras-hub looks for its expression letter by letter.

    It passes Llama 3's to `tokenizers` as a plain string (keras-hub 0.32).
    """
    if layer is None or "keras_hub" not in sys.modules:
        return False
    from keras_hub.tokenizers import BytePairTokenizer

    if not isinstance(layer, BytePairTokenizer) or layer.vocabulary is None:
        return False
    layer._maybe_initialized_tokenizers()
    splitter = layer._tokenizer.pre_tokenizer
    return splitter is not None and (
        len(splitter.pre_tokenize_str("to be")) == 1
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


class _OnDemand:
    """Stands for `HuggingFaceTokenizer` until a file asks for it.

    That class is one of keras-hub's kind, which is slow to import.
    """

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        from keras_peft.hf_tokenizer import HuggingFaceTokenizer

        return HuggingFaceTokenizer.from_config(config)


keras.saving.get_custom_objects().setdefault(
    "keras_peft>HuggingFaceTokenizer", _OnDemand
)
