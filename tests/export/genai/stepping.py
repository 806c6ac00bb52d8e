"""A graph in plain ONNX Runtime, some tokens at a time."""

import numpy as np
import onnxruntime


class Stepping:
    """The graph, and the keys and values of the tokens it has seen."""

    def __init__(self, path):
        self.session = onnxruntime.InferenceSession(str(path))
        self.caches = [
            i for i in self.session.get_inputs() if i.name.startswith("past")
        ]

    def __call__(self, ids, mask=None, sizes=()):
        """Logits of all tokens, fed in steps of `sizes`, then one by one."""
        ids = np.asarray(ids, "int64")
        mask = np.ones_like(ids) if mask is None else np.asarray(mask, "int64")
        past = [
            np.zeros((len(ids), i.shape[1], 0, i.shape[3]), "float32")
            for i in self.caches
        ]
        parts, start = [], 0
        sizes = [*sizes, *[1] * (ids.shape[1] - sum(sizes))]
        for size in sizes:
            stop = start + size
            names = [i.name for i in self.caches]
            feed = dict(zip(names, past, strict=True))
            feed["input_ids"] = ids[:, start:stop]
            feed["attention_mask"] = mask[:, :stop]
            logits, *past = self.session.run(None, feed)
            parts.append(logits)
            start = stop
        return np.concatenate(parts, axis=1)
