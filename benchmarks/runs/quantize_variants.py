"""The variants that `benchmarks/quantize_llm.py` measures."""

import concurrent.futures
import os

import keras
import numpy as np
from runs.quantize_training import inputs_of

from keras_peft import layer_tree
from keras_peft.calibration import LayerInputs
from keras_peft.calibration import observe
from keras_peft.export.blockwise import gptq
from keras_peft.export.blockwise import quantize
from keras_peft.export.blockwise import search
from keras_peft.export.blockwise.mixture import Group
from keras_peft.export.blockwise.mixture import in_4_bits
from keras_peft.export.genai.plan import LAYER_BLOCKS
from keras_peft.export.genai.plan import TABLE_BLOCK
from keras_peft.kernels import kernel_of

BUDGET = 104_500_000
# Rows of the calibration on which each group's loss at 4 bits is measured.
SENSITIVITY_ROWS = 4


class Model:
    """A decoder whose kernels are put in and out.

    Attributes:
        kernels: `{path: (inputs, outputs) array}` of its linear layers, in
            float32, as they were.
        grams: `{path: mean of x x^T}` over the calibration.
    """

    def __init__(self, model, calibration):
        self.model = model
        self.layers = {
            path: layer
            for path, layer in layer_tree.walk(model)
            if isinstance(layer, keras.layers.Dense | keras.layers.EinsumDense)
        }
        (self.table,) = (
            layer
            for _, layer in layer_tree.walk(model)
            if isinstance(layer, keras.layers.Embedding)
        )
        self.kernels = {
            path: kernel_of(layer).read() for path, layer in self.layers.items()
        }
        self.rows = keras.ops.convert_to_numpy(self.table.embeddings)
        self.calibration = calibration
        self.grams = self._grams(calibration)

    def _grams(self, calibration):
        batches = [inputs_of(row[None]) for row in calibration]
        seen = observe(self.model, self.layers, batches, LayerInputs)
        return {path: s.gram / s.count for path, s in seen.items()}

    def put(self, stored):
        """Gives the model the kernels of `{path: Blockwise}`."""
        for path, kernel in stored.items():
            self.put_kernel(path, kernel.kernel())

    def put_kernel(self, path, matrix):
        layer = self.layers[path]
        layer.kernel.assign(kernel_of(layer).from_matrix(matrix))

    def put_table(self, bits):
        """Rounds the table of tokens, which is the head; its bytes."""
        stored = quantize(self.rows.T, bits, TABLE_BLOCK)
        self.table.embeddings.assign(stored.kernel().T)
        return stored.nbytes

    def restore(self):
        for path, kernel in self.kernels.items():
            self.put_kernel(path, kernel)
        self.table.embeddings.assign(self.rows)

    def all(self, rounded):
        """`{path: rounded(path)}` for all linear layers."""
        workers = min(8, os.cpu_count() or 1)
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            found = pool.map(rounded, self.layers)
            return dict(zip(self.layers, found, strict=True))

    def groups(self):
        """Paths of layers with the same inputs."""
        found = {}
        for path, gram in self.grams.items():
            block = path.split("transformer_layers.")[-1].split(".")[0]
            key = block, gram.shape, float(gram.sum())
            found.setdefault(key, []).append(path)
        return [tuple(paths) for paths in found.values()]


def variants(model, trained):
    """Yields `(name, {path: Blockwise})`, the table in 8 bits in all."""
    kernels, grams = model.kernels, model.grams
    squares = {path: np.diagonal(gram) for path, gram in grams.items()}
    large = LAYER_BLOCKS[8]
    eight = model.all(lambda p: quantize(kernels[p], 8, large))
    yield "int8, nearest", eight
    yield (
        "int8, GPTQ",
        model.all(lambda p: gptq(kernels[p], grams[p], 8, large)),
    )
    yield "int4, nearest", model.all(lambda p: quantize(kernels[p], 4))
    yield "int4, best grid", model.all(lambda p: search(kernels[p], 4))
    yield (
        "int4, best grid for the inputs",
        model.all(lambda p: search(kernels[p], 4, 32, squares[p])),
    )
    small = model.all(lambda p: gptq(kernels[p], grams[p], 4))
    yield "int4, GPTQ", small
    yield "int4, GPTQ, and int8", _mixed(model, small, eight)
    for name, stored in trained.items():
        yield f"int4, quantization-aware, {name}", stored


def _mixed(model, small, large):
    """The most sensitive layers in 8 bits, within the budget."""
    budget = BUDGET - quantize(model.rows.T, 8, TABLE_BLOCK).nbytes
    chosen = in_4_bits(_sensitivities(model, small, large), budget)
    fours = {path for group in chosen for path in group.paths}
    return {p: small[p] if p in fours else large[p] for p in small}


def _sensitivities(model, small, large):
    rows = model.calibration[:SENSITIVITY_ROWS]
    model.restore()
    reference = log_probabilities(model.model, rows)
    groups = []
    for paths in model.groups():
        for path in paths:
            model.put_kernel(path, small[path].kernel())
        loss = divergence(reference, log_probabilities(model.model, rows))
        for path in paths:
            model.put_kernel(path, model.kernels[path])
        sizes = [
            sum(stored[path].nbytes for path in paths)
            for stored in (small, large)
        ]
        groups.append(Group(paths, *sizes, loss))
    return groups


def log_probabilities(model, tokens, mask=None):
    logits = model.predict_on_batch(inputs_of(tokens, mask))
    return keras.ops.log_softmax(keras.ops.convert_to_tensor(logits))


def divergence(reference, found):
    """Mean Kullback-Leibler divergence per token, from the reference."""
    ops = keras.ops
    per_token = ops.sum(ops.exp(reference) * (reference - found), axis=-1)
    return float(ops.mean(per_token))
