"""A built folder in ONNX Runtime, and in onnxruntime-genai."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_peft.export.genai import graph

# What a user waits for: one more token after a prompt of some length.
PROMPT, TIMED = 32, 16


class Session:
    """A graph, some tokens at a time.

    Args:
        folder: Where the graph is.
        threads: How many to compute with; 0 for one per core.
        adapter: An adapter file that takes part.
    """

    def __init__(
        self, folder: Path, threads: int = 0, adapter: Path | None = None
    ):
        import onnxruntime

        from keras_peft.export.genai.adapter_file import WithAdapter

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(
            folder / graph.FILE, options, providers=["CPUExecutionProvider"]
        )
        self._run_options = None
        if adapter is not None:
            self._run_options = WithAdapter(self._session, adapter)
        self._caches = [
            value
            for value in self._session.get_inputs()
            if value.name.startswith("past_key_values")
        ]
        self._outputs = [
            value.name
            for value in self._session.get_outputs()
            if value.name == "logits" or value.name.startswith("present.")
        ]

    def empty(self) -> list[np.ndarray]:
        """Keys and values of no tokens."""
        shapes = [(1, v.shape[1], 0, v.shape[3]) for v in self._caches]
        return [np.zeros(shape, "float32") for shape in shapes]

    def step(
        self, ids: Sequence[int], past: list[np.ndarray]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits `[tokens, vocabulary]`, and keys and values with theirs."""
        names = [value.name for value in self._caches]
        total = past[0].shape[2] + len(ids)
        feed = dict(zip(names, past, strict=True))
        feed["input_ids"] = np.array([ids], "int64")
        feed["attention_mask"] = np.ones((1, total), "int64")
        logits, *present = self._session.run(
            self._outputs, feed, self._run_options
        )
        return logits[0], present

    def logits(self, ids: Sequence[int], prompt: int) -> np.ndarray:
        """Logits of a text: its first tokens at once, the others singly."""
        found, past = self.step(ids[:prompt], self.empty())
        parts = [found]
        for id in ids[prompt:]:
            found, past = self.step([id], past)
            parts.append(found)
        return np.concatenate(parts)

    def milliseconds(self) -> float:
        """Median time of one more token."""
        _, past = self.step([1] * PROMPT, self.empty())
        times = []
        for _ in range(TIMED):
            start = time.perf_counter()
            _, past = self.step([1], past)
            times.append(time.perf_counter() - start)
        return 1000 * statistics.median(times)


def answer(
    folder: Path, ids: Sequence[int], count: int, adapter: Path | None = None
) -> tuple[list[int], np.ndarray]:
    """What onnxruntime-genai goes on with, most likely token by token.

    Returns:
        The new tokens, fewer where the text ends, and the logits that each
        was chosen by, `[tokens, vocabulary]`.
    """
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(folder))
    options = onnxruntime_genai.GeneratorParams(model)
    length = len(ids) + count
    options.set_search_options(do_sample=False, max_length=length)
    generator: Any = onnxruntime_genai.Generator(model, options)
    shelf = onnxruntime_genai.Adapters(model)
    if adapter is not None:
        shelf.load(str(adapter), "adapter")
        generator.set_active_adapter(shelf, "adapter")
    generator.append_tokens(np.array([ids], "int32"))
    chosen_by: list[np.ndarray] = []
    while not generator.is_done() and len(chosen_by) < count:
        chosen_by.append(np.array(generator.get_logits())[0, -1])
        generator.generate_next_token()
    tokens = [int(id) for id in generator.get_sequence(0)[len(ids) :]]
    return tokens, np.stack(chosen_by)
