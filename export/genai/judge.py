"""What the Keras model makes of prompts and texts, beside its files."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import keras

from keras_peft.export.assess import num_bytes
from keras_peft.export.checks import enforce
from keras_peft.export.genai import compare
from keras_peft.export.genai import graph
from keras_peft.export.genai.facts import Facts
from keras_peft.export.genai.runtime import Session
from keras_peft.export.genai.verdict import warning
from keras_peft.export.report import Step
from keras_peft.export.result import Verification
from keras_peft.merge import as_base


class Judge:
    """A Keras model to which its files are compared.

    Attributes:
        prompts: Token ids of short texts.
        notes: Sentences a user should read.
        warning: What speaks against shipping the last file, if anything.

    Args:
        model: The Keras model.
        facts: Its sizes.
        context_length: How many tokens its files serve.
        pieces: Token ids of the user's own text.
    """

    def __init__(
        self,
        model: keras.Model,
        facts: Facts,
        context_length: int,
        pieces: Sequence[Sequence[int]],
    ):
        self.prompts = compare.prompts(facts, pieces, context_length)
        self.references = [
            compare.keras_logits(model, ids) for ids in self.prompts
        ]
        self.bound = compare.bound(model, facts)
        self.pieces = pieces
        self.notes: list[str] = []
        self.warning = ""
        self._model = model
        self.scores = self._scores() if pieces else None

    @property
    def keras(self) -> Step:
        """The model as it was given."""
        variables = self._model.variables
        size = sum(map(num_bytes, variables))
        loss = None if self.scores is None else self.scores.loss
        return Step("keras", size, loss=loss)

    def check(
        self, folder: Path, name: str, tolerance: float | None
    ) -> Verification:
        """How far the graph in a folder is from Keras on the prompts."""
        return compare.compare_logits(
            Session(folder), self.prompts, self.references, name, tolerance
        )

    def step(self, folder: Path, name: str, tolerance: float | None) -> Step:
        """Measures the graph in a folder; raises beyond `tolerance`."""
        check = self.check(folder, name, tolerance)
        enforce(check)
        size = sum(f.stat().st_size for f in folder.glob(graph.FILE + "*"))
        found = Step(
            name,
            size,
            max_abs=check.max_abs,
            relative=check.relative,
            cosine=check.cosine,
        )
        if self.scores is None:
            return found
        session = Session(folder)
        scores = compare.joined(
            [compare.score(session.logits(p, len(p)), p) for p in self.pieces]
        )
        if name != "float32":
            self._note(name, self.scores, scores)
            self.warning = warning(name, self._base(), self.scores, scores)
        return dataclasses.replace(found, loss=scores.loss)

    def _note(
        self, name: str, tuned: compare.Scores, scores: compare.Scores
    ) -> None:
        change, error = compare.difference(tuned, scores)
        same = float((scores.choices == tuned.choices).mean())
        self.notes.append(
            f"On {len(scores.losses)} tokens of text, {name} changes the loss "
            f"by {change:+.4f} ± {error:.4f}; the most likely next token is "
            f"that of Keras for {same:.1%}."
        )

    def _base(self) -> compare.Scores | None:
        """Scores before fine-tuning, if the model was merged just now."""
        with as_base(self._model) as is_merged:
            return self._scores() if is_merged else None

    def _scores(self) -> compare.Scores:
        """Scores of the Keras model as it is now."""
        return compare.joined(
            [
                compare.score(compare.keras_logits(self._model, p), p)
                for p in self.pieces
            ]
        )
