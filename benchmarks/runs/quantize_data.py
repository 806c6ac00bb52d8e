"""What `benchmarks/quantize_llm.py` trains, calibrates and measures on."""

from pathlib import Path

import numpy as np
from runs.data import DATA
from runs.data import _dialogues
from runs.data import _rows

TASKS = ("dialogue", "novel")
TRAINED, OTHER = "austen_persuasion.txt", "austen_northangerabbey.txt"
# Tokens per row: of calibration, of training on a novel, of measuring it.
CALIBRATION_ROWS, LENGTH, MEASURED = 24, 256, 512
# Parts of what is measured, of which the spread gives the standard error.
CHUNKS = 8
DIALOGUES = 256


def load(task, preset):
    """`{part: {"tokens", "mask", "targets", "weights"}}` and calibration."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(preset) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    parts = {"dialogue": _dialogue, "novel": _novel}[task](tokenizer)
    return parts | {"calibration": _calibration(task, tokenizer)}


def texts(task):
    """The training texts, as a user would hand them to the exporter."""
    if task == "novel":
        return [(DATA / TRAINED).read_text(encoding="utf-8")]
    return [
        f"<|im_start|>user\n{row['prompt']}<|im_end|>\n"
        f"<|im_start|>assistant\n{row['response']}<|im_end|>\n"
        for row in _rows("chatterbot_en.jsonl", "train")
    ]


def _calibration(task, tokenizer):
    """Rows of training text, evenly spread over it."""
    ids = [i for text in texts(task) for i in tokenizer.encode(text).ids]
    return _some(_in_rows(ids, LENGTH), CALIBRATION_ROWS)


def _dialogue(tokenizer):
    train, test = (_dialogues(tokenizer, s) for s in ("train", "test"))
    order = np.random.default_rng(0).permutation(len(test["tokens"]))
    picked = order[:DIALOGUES]
    return {"train": train, "test": {k: v[picked] for k, v in test.items()}}


def _novel(tokenizer):
    parts = {}
    for part, name, length in (
        ("train", TRAINED, LENGTH),
        ("test", OTHER, MEASURED),
    ):
        text = (DATA / name).read_text(encoding="utf-8")
        rows = _in_rows(tokenizer.encode(text).ids, length)
        rows = rows if part == "train" else _some(rows, CHUNKS)
        tokens, targets = rows[:, :-1], rows[:, 1:]
        parts[part] = dict(
            tokens=tokens,
            mask=np.ones(tokens.shape, bool),
            targets=targets,
            weights=np.ones(tokens.shape, "float32"),
        )
    return parts


def _in_rows(ids, length):
    whole = len(ids) // length * length
    return np.array(ids[:whole], "int32").reshape(-1, length)


def _some(rows, count):
    return rows[np.linspace(0, len(rows) - 1, count).astype(int)]
