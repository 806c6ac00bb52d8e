"""The adapters that one exported base is shipped with."""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnx_ir as ir

from keras_peft.export.checks import enforce
from keras_peft.export.genai import adapters as changes
from keras_peft.export.genai import compare
from keras_peft.export.genai.adapter_file import SUFFIX
from keras_peft.export.genai.adapter_file import write_file
from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.runtime import Session
from keras_peft.export.genai.slots import Slots
from keras_peft.export.genai.slots import base_id
from keras_peft.export.genai.slots import layers_of
from keras_peft.export.report import megabytes

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class Shelf:
    """Adapters by name, read from their folders.

    Attributes:
        place: The token that holds the place of a virtual one. Which it is
            means nothing, but that the runtime takes it for text.

    Args:
        model: The base they were trained on.
        folders: `{name: folder}`, or `None`: a base without places.

    Raises:
        ValueError: If a name is none for a file, or an adapter does not fit.
    """

    def __init__(
        self, model: keras.Model, folders: Mapping[str, str | Path] | None
    ):
        _check_names(folders or {})
        self._model, self._folders = model, dict(folders or {})
        self.place = 0
        self._changes = {
            name: changes.read(model, folder)
            for name, folder in self._folders.items()
        }

    @property
    def slots(self) -> Slots:
        """What places the graph must have."""
        found = self._changes.values()
        return Slots(
            low_rank=any(change.low_rank for change in found),
            prompts=any(change.prompt is not None for change in found),
            prefixes=any(change.prefix is not None for change in found),
        )

    def avoid(self, ends: Sequence[int], *others: int | None) -> None:
        """Chooses `place` among the tokens that are none of these."""
        special = {*ends, *others}
        self.place = next(i for i in itertools.count() if i not in special)

    def write(self, graph: ir.Model, decoder: Decoder, folder: Path) -> None:
        """Writes a file for each adapter beside a graph."""
        for name, change in self._changes.items():
            arrays = changes.parameters(decoder, layers_of(graph), change)
            write_file(folder / _file(name), arrays, base_id(decoder))

    def check(
        self,
        folder: Path,
        prompts: Sequence[Sequence[int]],
        tolerance: float | None,
    ) -> None:
        """Raises unless each file computes what Keras does, in float32."""
        for name in self._changes:
            session = self._session(folder, name)
            with changes.loaded(self._model, self._folders[name]):
                expected = [
                    compare.keras_logits(self._model, ids) for ids in prompts
                ]
            step = f"adapter {name!r}"
            enforce(
                compare.compare_logits(
                    session, prompts, expected, step, tolerance
                )
            )

    def answer(
        self, folder: Path, prompt: Sequence[int], tolerance: float
    ) -> None:
        """Raises unless onnxruntime-genai says what the graph says."""
        for name in self._changes:
            file = folder / _file(name)
            ids = [*self._before(name), *prompt]
            session = Session(folder, adapter=file)
            compare.check_answer(folder, session, ids, tolerance, file)

    def notes(self, folder: Path, pieces: Sequence[Sequence[int]]) -> list[str]:
        """What a user should know of each adapter."""
        return [self._note(folder, name, pieces) for name in self._changes]

    def _note(
        self, folder: Path, name: str, pieces: Sequence[Sequence[int]]
    ) -> str:
        change = self._changes[name]
        size = megabytes((folder / _file(name)).stat().st_size)
        kind = f"rank {change.rank}"
        if change.tokens:
            kind = f"{change.tokens} virtual tokens"
        said = f"Adapter {name!r}: {kind}, {size}."
        if change.report is not None:
            path, lost = change.report.worst
            said += (
                f" Converted to LoRA, it misses at most {lost:.2g} of a "
                f"kernel's change (`{path}`)."
            )
        if not pieces:
            return said
        session = self._session(folder, name)
        stored = _scores(lambda p: session.logits(p, len(p)), pieces)
        with changes.loaded(self._model, self._folders[name]):
            trained = _scores(
                lambda p: compare.keras_logits(self._model, p), pieces
            )
        more, error = compare.difference(trained, stored)
        return (
            f"{said} Over this base, its loss is {stored.loss:.4f}, "
            f"{more:+.4f} ± {error:.4f} from that in Keras."
        )

    def _session(self, folder: Path, name: str) -> Any:
        session = Session(folder, adapter=folder / _file(name))
        return _Behind(session, self._before(name))

    def _before(self, name: str) -> list[int]:
        return [self.place] * self._changes[name].tokens

    @property
    def entries(self) -> dict[str, Any]:
        """What the manifest says of each adapter."""
        return {
            name: {
                "file": _file(name),
                "rank": change.rank,
                # To be put before every prompt.
                "tokens": self._before(name),
            }
            for name, change in self._changes.items()
        }


@dataclasses.dataclass(frozen=True)
class _Behind:
    """A session whose texts begin behind virtual tokens."""

    session: Session
    before: list[int]

    def logits(self, ids: Sequence[int], prompt: int) -> np.ndarray:
        start = len(self.before)
        found = self.session.logits([*self.before, *ids], start + prompt)
        return found[start:]


def _scores(run: Any, pieces: Sequence[Sequence[int]]) -> compare.Scores:
    found = compare.joined([compare.score(run(p), p) for p in pieces])
    assert found is not None
    return found


def _file(name: str) -> str:
    return f"{name}{SUFFIX}"


def _check_names(folders: Mapping[str, str | Path]) -> None:
    wrong = [n for n in folders if not _NAME.fullmatch(n)]
    lower = [name.lower() for name in folders]
    wrong += [n for n in folders if lower.count(n.lower()) > 1]
    if wrong:
        raise ValueError(
            "An adapter's name is that of its file: letters, digits, `-`, `_` "
            "and `.`, and no two that some disk takes for one. "
            f"Received: adapters={wrong}"
        )
