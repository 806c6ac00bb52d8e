"""`keras-peft chat folder/`: a language model answers in the terminal.

onnxruntime-genai does all of it; neither Keras nor keras_peft is imported.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

MANIFEST = "manifest.json"
CONFIG = "genai_config.json"
TEMPLATE = "chat_template.jinja"

Message = dict[str, str]


def add(commands: Any) -> None:
    """Says what the command takes."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "chat",
        help="talk to an exported language model",
        description=(
            "Talk to a language model that `keras_peft.export.to_genai` "
            "exported. Each line is a message; an empty one, or the end of "
            "the input, ends the chat."
        ),
    )
    parser.add_argument("folder", type=Path, help="the exported folder")
    parser.add_argument("--adapter", help="one of the folder's adapters")
    parser.add_argument("--system", help="what the model is told first")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=512,
        help="longest answer (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Reads messages and streams answers until the input ends."""
    model = Folder(options.folder, options.adapter)
    messages: list[Message] = []
    if options.system is not None:
        messages.append({"role": "system", "content": options.system})
    console = Console()
    while text := _line(console):
        messages.append({"role": "user", "content": text})
        words = []
        for word in model.answer(messages, options.max_tokens):
            print(word, end="", flush=True)
            words.append(word)
        print(flush=True)
        messages.append({"role": "assistant", "content": "".join(words)})


def _line(console: Console) -> str:
    """What the user typed, or the next line of a file; empty at the end."""
    try:
        if sys.stdin.isatty():
            return console.input("[bold green]>[/] ").strip()
        return input().strip()
    except EOFError:
        return ""


class Folder:
    """An exported language model, with one of its adapters or none.

    Args:
        folder: A folder that `keras_peft.export.to_genai` wrote.
        adapter: Name of an adapter in it.

    Raises:
        ValueError: If the folder is no such export, is damaged, or has no
            adapter of that name.
    """

    def __init__(self, folder: Path, adapter: str | None = None):
        genai = _runtime()
        manifest = _manifest(folder)
        entry = _entry(folder, manifest, adapter)
        try:
            self._model = genai.Model(str(folder))
            self._tokenizer = genai.Tokenizer(self._model)
        except Exception as error:
            raise ValueError(
                f"onnxruntime-genai cannot load the folder: {error} "
                f"Export it again. Received: {str(folder)!r}"
            ) from None
        if manifest.get("add_bos") and not self._chats(folder):
            self._tokenizer.update_options(add_special_tokens="true")
        self._genai, self._name = genai, adapter
        self._context = manifest["context_length"]
        self._has_template = self._chats(folder)
        self._before = entry.get("tokens", [])
        self._adapters = genai.Adapters(self._model)
        if adapter is not None:
            self._adapters.load(str(folder / entry["file"]), adapter)

    @staticmethod
    def _chats(folder: Path) -> bool:
        return (folder / TEMPLATE).is_file()

    def answer(self, messages: list[Message], max_tokens: int) -> Iterator[str]:
        """Yields the answer to a conversation piece by piece.

        A model without a chat template goes on with the last message.
        """
        ids = [*self._before, *self._encode(messages)]
        if len(ids) >= self._context:
            raise ValueError(
                "The conversation is longer than the model's context. Start "
                f"a new one. Received: {len(ids)} tokens of {self._context}"
            )
        parameters = self._genai.GeneratorParams(self._model)
        end = min(len(ids) + max_tokens, self._context)
        parameters.set_search_options(max_length=end)
        generator = self._genai.Generator(self._model, parameters)
        if self._name is not None:
            generator.set_active_adapter(self._adapters, self._name)
        generator.append_tokens([ids])
        stream = self._tokenizer.create_stream()
        while not generator.is_done():
            generator.generate_next_token()
            (token,) = generator.get_next_tokens()
            if token not in self._tokenizer.eos_token_ids:
                yield stream.decode(token)

    def _encode(self, messages: list[Message]) -> list[int]:
        text = messages[-1]["content"]
        if self._has_template:
            text = self._tokenizer.apply_chat_template(
                json.dumps(messages), add_generation_prompt=True
            )
        return [int(id) for id in self._tokenizer.encode(text)]


def _runtime() -> Any:
    try:
        import onnxruntime_genai
    except ImportError:
        raise ImportError(
            "Chatting needs onnxruntime-genai: `pip install "
            "keras-peft[genai]`, or onnxruntime-genai alone."
        ) from None
    return onnxruntime_genai


def _manifest(folder: Path) -> dict[str, Any]:
    missing = [n for n in (MANIFEST, CONFIG) if not (folder / n).is_file()]
    if missing:
        raise ValueError(
            "Expected a folder that `keras_peft.export.to_genai` wrote. "
            f"Received: {str(folder)!r} without {', '.join(missing)}"
        )
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            "The folder has no tokenizer, so the model takes ids and no "
            "text. Export it with `tokenizer`, or with a model that has a "
            f"preprocessor. Received: {str(folder)!r}"
        )
    found: dict[str, Any] = json.loads(
        (folder / MANIFEST).read_text(encoding="utf-8")
    )
    return found


def _entry(
    folder: Path, manifest: dict[str, Any], adapter: str | None
) -> dict[str, Any]:
    """What the manifest says of an adapter."""
    if adapter is None:
        return {}
    known = manifest.get("adapters", {})
    if adapter not in known:
        names = ", ".join(map(repr, known)) or "none"
        raise ValueError(
            f"The folder has no such adapter; it has {names}. "
            f"Received: --adapter {adapter}"
        )
    entry: dict[str, Any] = known[adapter]
    if not (folder / entry["file"]).is_file():
        raise ValueError(
            f"The folder's file {entry['file']!r} is missing. Export it "
            f"again. Received: --adapter {adapter}"
        )
    return entry
