"""The chat template of a Hugging Face folder."""

import json
from pathlib import Path


def read_chat_template(folder: str | Path) -> str | None:
    """The template, wherever it lies; of several, the default one."""
    file = Path(folder) / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    config = Path(folder) / "tokenizer_config.json"
    if not config.is_file():
        return None
    template = json.loads(config.read_text("utf-8")).get("chat_template")
    if isinstance(template, list):
        named = {each["name"]: each["template"] for each in template}
        template = named.get("default")
    return template or None
