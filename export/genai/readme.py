"""The README of a folder for onnxruntime-genai."""

from collections.abc import Mapping
from typing import Any

from keras_peft.export.genai.tokenizer import TokenizerFiles
from keras_peft.export.report import ExportReport

FILES = {
    "genai_config.json": "what onnxruntime-genai must know of the model",
    "model.onnx": "the model",
    "model.onnx.data": "its weights",
    "tokenizer.json": "text to ids, as in training",
    "tokenizer_config.json": "special tokens",
    "chat_template.jinja": "how a chat becomes a text",
    "manifest.json": "sizes, hashes and versions",
    "report.html": "size, speed and quality, to read",
    "report.json": "the same, for programs",
}

_HEAD = """\
# {name}

A language model for [onnxruntime-genai](https://onnxruntime.ai/docs/genai/),
exported by keras_peft. It runs on Android, iOS, Windows, Linux and macOS,
without Keras.

{table}

## Run it

`pip install onnxruntime-genai`

```python
{code}
```
"""

_TEXT = """\
import onnxruntime_genai

model = onnxruntime_genai.Model(".")
tokenizer = onnxruntime_genai.Tokenizer(model)
stream = tokenizer.create_stream()
{prompt}
options = onnxruntime_genai.GeneratorParams(model)
options.set_search_options(max_length={length})
generator = onnxruntime_genai.Generator(model, options)
generator.append_tokens(tokenizer.encode(prompt))
while not generator.is_done():
    generator.generate_next_token()
    token = generator.get_next_tokens()[0]
    print(stream.decode(token), end="", flush=True)"""

_CHAT = """\
messages = '[{"role": "user", "content": "What is the capital of France?"}]'
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)"""

_IDS = """\
import numpy
import onnxruntime_genai

model = onnxruntime_genai.Model(".")
options = onnxruntime_genai.GeneratorParams(model)
options.set_search_options(max_length={length})
generator = onnxruntime_genai.Generator(model, options)
generator.append_tokens(numpy.array([[1, 2, 3]], "int32"))
while not generator.is_done():
    generator.generate_next_token()
    print(generator.get_next_tokens()[0])"""


_ADAPTERS = """
## Adapters

The base answers, or one of {names}. Choose for each request, before its first
tokens: what was read without an adapter stays in the cache as it is.

```python
adapters = onnxruntime_genai.Adapters(model)
adapters.load("{file}", "{name}")
generator = onnxruntime_genai.Generator(model, options)
generator.set_active_adapter(adapters, "{name}")
```
"""

_VIRTUAL = """
With {names}, the ids in `tokens` of `manifest.json` stand before those of
every prompt: they hold the places of virtual tokens.

```python
tokens = json.load(open("manifest.json"))["adapters"]["{name}"]["tokens"]
generator.append_tokens([*tokens, *tokenizer.encode(prompt)])
```
"""

_TERMINAL = """
In a terminal: `keras-peft chat . --adapter {name}`.
"""


def readme(
    report: ExportReport,
    files: Mapping[str, int],
    tokens: TokenizerFiles | None,
    context_length: int,
    adapters: Mapping[str, Any],
) -> str:
    """What is in the folder, and code that runs it."""
    length = min(256, context_length)
    code = _IDS.format(length=length)
    if tokens is not None:
        chat = tokens.chat_template is not None
        prompt = _CHAT if chat else 'prompt = "The first words of a text"'
        code = _TEXT.replace("{prompt}", prompt).replace(
            "{length}", str(length)
        )
        if tokens.add_bos and not chat:
            start = "model was trained on texts that start with a special token"
            code = code.replace(
                "stream = ",
                f"# The {start}.\n"
                'tokenizer.update_options(add_special_tokens="true")\n'
                "stream = ",
            )
    known = FILES | {e["file"]: f"adapter `{n}`" for n, e in adapters.items()}
    rows = [f"| {n} | {known.get(n, '')} |" for n in files]
    table = "\n".join(["| file | what it is |", "|---|---|", *rows])
    text = _HEAD.format(name=report.model, table=table, code=code)
    text += _about_adapters(adapters, tokens is not None)
    if report.warning:
        text = f"{report.warning}\n\n{text}"
    if report.notes:
        text += "\n## Notes\n\n" + "\n".join(f"* {n}" for n in report.notes)
        text += "\n"
    return text


def _about_adapters(adapters: Mapping[str, Any], takes_text: bool) -> str:
    """How to switch them on; nothing where there are none."""
    if not adapters:
        return ""
    first, *_ = adapters
    names = ", ".join(f"`{name}`" for name in adapters)
    text = _ADAPTERS.format(
        names=names, name=first, file=adapters[first]["file"]
    )
    virtual = [name for name, entry in adapters.items() if entry["tokens"]]
    if virtual:
        names = ", ".join(f"`{name}`" for name in virtual)
        text += _VIRTUAL.format(names=names, name=virtual[0])
    return text + _TERMINAL.format(name=first) if takes_text else text
