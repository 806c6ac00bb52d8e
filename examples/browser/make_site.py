"""Makes a site of exported folders that a browser runs: static files only.

python examples/browser/make_site.py OUT [--classifier FOLDER] [--chat FOLDER]

The first time, npm brings three libraries; afterwards nothing is downloaded.
"""

import argparse
import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import safetensors.numpy
from rewrite import Rewriter

HERE = Path(__file__).parent
PAGES = ("index.html", "style.css", "*.js")
LIBRARIES = HERE / "libraries"
# Package: version, its SHA-512 in base64, and what is taken of it.
PACKAGES = {
    "onnxruntime-web": (
        "1.30.0",
        "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
        {
            "dist/ort.wasm.min.mjs": "ort.js",
            "dist/ort-wasm-simd-threaded.mjs": "ort-wasm-simd-threaded.mjs",
            "dist/ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm",
        },
    ),
    "@huggingface/tokenizers": (
        "0.2.0",
        "LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
        {"dist/tokenizers.min.mjs": "tokenizers.js"},
    ),
    "@huggingface/jinja": (
        "0.5.11",
        "YzEzwM5oQf4r0vs7ifWQ+yuVR1YkAHrjERQ+a8WRsStHHp4NRBg+NesjiFc+X2AFUpRvvrIeHDS1xFy9jY/IjQ==",
        {"dist/index.js": "jinja.js"},
    ),
}
CLASSIFIER = (
    "model.onnx",
    "tokenizer.json",
    "preprocessor.json",
    "labels.json",
)
CHAT = ("model.onnx", "genai_config.json", "tokenizer.json")
CHAT_TEXTS = ("tokenizer_config.json", "chat_template.jinja")
DATA = "model.onnx.data"


def make(out, classifier=None, chat=None):
    """Writes the site; `out` is a new folder, or an older site."""
    if classifier is None and chat is None:
        raise ValueError(
            "A site shows an exported folder. Pass `--classifier`, `--chat` "
            "or both. Received: neither"
        )
    for folder, names in ((classifier, CLASSIFIER), (chat, CHAT)):
        check(folder, names)
    out.mkdir(parents=True, exist_ok=True)
    for pattern in PAGES:
        for page in HERE.glob(pattern):
            shutil.copy(page, out)
    shutil.copytree(libraries(), out / "libraries", dirs_exist_ok=True)
    site = {}
    if classifier:
        site["classifier"] = write_classifier(classifier, out / "classifier")
    if chat:
        site["chat"] = write_chat(chat, out / "chat")
    write_json(out / "site.json", site)


def check(folder, names):
    missing = [n for n in names if folder and not (folder / n).exists()]
    if missing:
        raise ValueError(
            "The folder is not one that `keras_peft.export` wrote for this "
            f"page: it lacks {missing}. Classifiers of texts come from "
            "`to_onnx`, with a preprocessor and labels, language models from "
            f"`to_genai`. Received: {str(folder)!r}"
        )


def write_classifier(folder, out):
    out.mkdir(exist_ok=True)
    for name in (*CLASSIFIER, DATA):
        copy(folder / name, out)
    return entry(out)


def write_chat(folder, out, bits=16):
    """The model for browsers, and its adapters as safetensors files."""
    out.mkdir(exist_ok=True)
    for name in (*CHAT[1:], *CHAT_TEXTS):
        copy(folder / name, out)
    model = onnx.load(folder / "model.onnx")
    slots = Rewriter(model).rewrite(bits)
    (out / DATA).unlink(missing_ok=True)
    onnx.save(
        model,
        out / "model.onnx",
        save_as_external_data=True,
        location=DATA,
    )
    (out / DATA).chmod(0o644)
    adapters = {}
    for file in sorted(folder.rglob("*.onnx_adapter")):
        adapters[file.stem] = write_adapter(file, slots, out)
    return {**entry(out), "adapters": adapters}


def write_adapter(file, slots, out):
    # The numbers lie in the memory of `read`.
    read = onnxruntime.AdapterFormat.read_adapter(str(file))
    found = {k: np.array(v.numpy()) for k, v in read.get_parameters().items()}
    wrong = sorted(set(found) - slots)
    if wrong:
        raise ValueError(
            "In a browser, adapters may change kernels by matrices of low "
            "rank alone. Leave this adapter out of the folder, or export its "
            f"model merged. Received: {file.name} with {wrong[:4]}"
        )
    name = f"adapter-{file.stem}.safetensors"
    safetensors.numpy.save_file(found, out / name)
    return name


def entry(out):
    """What the page has to know of a folder: sizes, and hashes as versions."""
    return {
        "folder": out.name,
        "files": {
            file.name: {
                "bytes": file.stat().st_size,
                "hash": hashlib.sha256(file.read_bytes()).hexdigest()[:16],
            }
            for file in sorted(out.iterdir())
        },
    }


def copy(file, out):
    if file.exists():
        shutil.copy(file, out)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n", "utf-8")


# -- Libraries ---------------------------------------------------------------


def libraries():
    """The folder of the libraries, brought by npm if it is not there."""
    if not LIBRARIES.exists():
        with tempfile.TemporaryDirectory(dir=HERE) as staging:
            whole = Path(staging) / "whole"
            whole.mkdir()
            for package, (version, digest, files) in PACKAGES.items():
                bring(f"{package}@{version}", digest, files, whole)
            whole.rename(LIBRARIES)
    return LIBRARIES


def bring(package, digest, files, folder):
    with tempfile.TemporaryDirectory() as packed:
        subprocess.run(
            ["npm", "pack", "--silent", "--pack-destination", packed, package],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        [archive] = Path(packed).iterdir()
        found = hashlib.sha512(archive.read_bytes()).digest()
        if base64.b64encode(found).decode() != digest:
            raise ValueError(
                "npm brought another file than the one this was tested with. "
                f"Received: {package}"
            )
        with tarfile.open(archive) as tar:
            for path, name in files.items():
                with tar.extractfile(f"package/{path}") as source:
                    (folder / name).write_bytes(source.read())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--classifier", type=Path)
    parser.add_argument("--chat", type=Path)
    options = parser.parse_args()
    try:
        make(options.out, options.classifier, options.chat)
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    print(f"Look at it: python {HERE / 'serve.py'} {options.out}")


if __name__ == "__main__":
    main()
