"""The deployable folder: written whole or not at all, and checked later."""

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras_peft
from keras_peft.export.preprocessor import Preprocessing
from keras_peft.export.report import ExportReport
from keras_peft.export.result import ModelFile
from keras_peft.export.result import Result
from keras_peft.export.result import TensorSpec
from keras_peft.export.snippet import readme
from keras_peft.files import existing_folder
from keras_peft.files import whole_folder

FORMAT = "keras_peft.export/1"
MANIFEST = "manifest.json"


def write_folder(
    folder: str | Path,
    result: Result,
    preprocessing: Preprocessing,
    labels: Sequence[str] | None,
    report: ExportReport,
) -> None:
    """Writes everything a device needs to `folder`, or leaves it as it was."""
    with whole_folder(folder) as staging:
        result.file.write(staging)
        preprocessing.write(staging)
        if labels:
            write_json(staging / "labels.json", list(labels))
        report.write(staging)
        names = sorted(file.name for file in staging.iterdir())
        text = readme(report, [*names, MANIFEST], result, preprocessing, labels)
        (staging / "README.md").write_text(text, "utf-8")
        write_json(staging / MANIFEST, _manifest(staging, result, report))


def check_target(folder: str | Path) -> list[str]:
    """What speaks against writing to `folder`, as sentences."""
    folder = Path(folder)
    if not folder.exists():
        return []
    if not folder.is_dir():
        return [f"`folder` names a file. Received: folder={str(folder)!r}"]
    if any(folder.iterdir()) and not _is_export(folder):
        return [
            "`folder` exists and is not an export; replacing it would delete "
            "what is in it. Choose a new folder. "
            f"Received: folder={str(folder)!r}"
        ]
    return []


def read_folder(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """The folder and its manifest, after every file was compared with it.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it is not an export, or files are missing or changed.
    """
    folder = existing_folder(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            "There is no such folder. `keras_peft.export.to_onnx(model, "
            f"folder)` makes one. Received: folder={str(folder)!r}"
        )
    if not _is_export(folder):
        raise ValueError(
            "The folder was not made by `keras_peft.export`: its "
            f"`{MANIFEST}` is missing or not ours. "
            f"Received: folder={str(folder)!r}"
        )
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    wrong = _wrong_files(folder, manifest["files"])
    if wrong:
        raise ValueError(
            "Files of the folder are not those that were exported. Copy the "
            "folder again, or export again. Received: " + "; ".join(wrong)
        )
    return folder, manifest


def specs(entries: Sequence[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    """Inputs or outputs as the manifest lists them."""
    return tuple(
        TensorSpec(e["name"], e["dtype"], tuple(e["shape"])) for e in entries
    )


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON that ends in a newline."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", "utf-8")


def _is_export(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def _wrong_files(folder: Path, files: dict[str, Any]) -> list[str]:
    wrong = []
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != expected["bytes"]:
            wrong.append(
                f"{name} has {path.stat().st_size} bytes instead of "
                f"{expected['bytes']}"
            )
        elif _sha256(path) != expected["sha256"]:
            wrong.append(f"{name} was changed")
    return wrong


def _manifest(
    folder: Path, result: Result, report: ExportReport
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "model": report.model,
        "quantization": result.quantize,
        "inputs": [_entry(spec) for spec in result.inputs],
        "outputs": [_entry(spec) for spec in result.outputs],
        **result.file.requirements(),
        "versions": _versions(result.file),
        "files": file_entries(folder),
    }


def file_entries(folder: Path) -> dict[str, Any]:
    """Size and hash of every file in a folder."""
    return {
        file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.iterdir())
    }


def _entry(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}


def _versions(file: ModelFile) -> dict[str, str]:
    packages = ("keras", "keras-hub", *file.packages, "tokenizers")
    versions = {"keras_peft": keras_peft.__version__}
    for package in packages:
        versions[package] = importlib.metadata.version(package)
    return versions


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
