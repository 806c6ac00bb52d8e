"""Folders that appear whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Yields a hidden folder beside `path` that takes its place on success.

    An exception, a full disk or a kill leaves `path` as it was. While an
    older folder is being replaced it stands at `<path>.previous` for the
    moment between two renames; `existing_folder` finds it there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(
        tempfile.mkdtemp(
            prefix=f".{path.name}.", suffix=".tmp", dir=path.parent
        )
    )
    try:
        yield staging
        _flush(staging)
        _take_place(staging, path)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError):
            raise OSError(
                f"The folder could not be written: {error}. What was there "
                "before is unchanged. Make room, or choose another place. "
                f"Received: {str(path)!r}"
            ) from error
        raise


def existing_folder(path: str | Path) -> Path:
    """`path`, or its older self where a kill came between two renames."""
    path = Path(path)
    previous = _previous(path)
    return previous if not path.exists() and previous.is_dir() else path


def _take_place(staging: Path, path: Path) -> None:
    previous = _previous(path)
    if path.exists():
        shutil.rmtree(previous, ignore_errors=True)
        path.rename(previous)
    try:
        staging.rename(path)
    except OSError:
        if previous.exists() and not path.exists():
            previous.rename(path)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _previous(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


def _flush(folder: Path) -> None:
    """Writes every file through to the disk: a rename must not outrun them."""
    folder.chmod(0o755)  # Temporary folders are private.
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o644)
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
