"""The README of a folder for onnxruntime-genai."""

from collections.abc import Mapping

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


def readme(
    report: ExportReport,
    files: Mapping[str, int],
    tokens: TokenizerFiles | None,
    context_length: int,
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
    rows = [f"| {n} | {FILES.get(n, '')} |" for n in files]
    table = "\n".join(["| file | what it is |", "|---|---|", *rows])
    text = _HEAD.format(name=report.model, table=table, code=code)
    if report.warning:
        text = f"{report.warning}\n\n{text}"
    if report.notes:
        text += "\n## Notes\n\n" + "\n".join(f"* {n}" for n in report.notes)
        text += "\n"
    return text
