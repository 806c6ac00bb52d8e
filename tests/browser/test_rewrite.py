"""What a graph computes after it was rewritten for browsers."""

import numpy as np
import onnx
import onnxruntime
import pytest
from described import VOCABULARY
from described import build
from rewrite import Rewriter

from keras_peft.export.blockwise import quantize
from keras_peft.export.genai import families
from keras_peft.export.genai import graph
from keras_peft.export.genai.decoder import Linear
from keras_peft.export.genai.decoder import parts
from keras_peft.export.genai.slots import Slots

IDS = np.random.default_rng(7).integers(1, VOCABULARY, (1, 11))
NAMES = ("gpt2", "llama", "llama_tied")


def on_grid(model):
    """Kernels that int8 with a scale per output holds exactly."""
    for layer in model._flatten_layers():
        for name in ("_kernel", "_embeddings", "reverse_embeddings"):
            weight = getattr(layer, name, None)
            if weight is not None:
                weight.assign(_to_grid(np.array(weight)))
    return model


def _to_grid(array):
    """Multiples of one step, the largest of every row and column 127 of it.

    Whichever axis the outputs are, they then have that very scale.
    """
    steps = np.rint(array / np.abs(array).max() * 100)
    flat = steps.reshape(len(steps), -1)
    rows, columns = flat.shape
    for at in range(max(rows, columns)):
        flat[at % rows, at % columns] = 127
    return (flat / 1024).reshape(array.shape).astype("float32")


def save(model, folder, plan=None, slots=None):
    decoder = families.describe(model)
    folder.mkdir()
    graph.save(graph.build(decoder, plan, slots), folder)
    return onnx.load(folder / "model.onnx")


def run(model, **more):
    session = onnxruntime.InferenceSession(model.SerializeToString())
    feed = {
        i.name: np.zeros(
            [s if isinstance(s, int) else 0 for s in i.shape], "float32"
        )
        for i in session.get_inputs()
    }
    feed["input_ids"], feed["attention_mask"] = IDS, np.ones_like(IDS)
    for name, value in feed.items():
        if name.startswith("past"):
            feed[name] = np.zeros((1, *value.shape[1:]), "float32")
    return session.run(["logits"], {**feed, **more})[0][:, -1]


@pytest.mark.parametrize("name", NAMES)
def test_kernels_on_the_grid_lose_nothing(name, tmp_path):
    model = save(on_grid(build(name)), tmp_path / "out")
    expected = run(model)
    Rewriter(model).rewrite()
    # Inputs are rounded to a 2**-16th of their range, in some ten products
    # one after the other, and the norms between them pass on what they get.
    bound = 10 * 2**-10 * np.abs(expected).max()
    assert np.abs(run(model) - expected).max() <= bound


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_read_as_onnxruntime_reads_them(name, bits, tmp_path):
    decoder = families.describe(keras_model := build(name))
    plan = {
        part.key: quantize(part.kernel, bits, 16)
        for part in parts(decoder, Linear)
    }
    plan[decoder.table.key] = quantize(decoder.table.rows.T, bits, 16)
    model = save(keras_model, tmp_path / "out", plan)
    expected = run(model)
    Rewriter(model).rewrite()
    kinds = {node.op_type for node in model.graph.node}
    assert "DynamicQuantizeMatMul" in kinds
    assert "MatMulNBits" not in kinds
    # One scale per output instead of one per block: half a step of 1 / 127 of
    # the largest weight, which is some three times the usual one, and signs
    # that cancel. MatMulNBits rounds its inputs to 8 bits besides.
    error = np.linalg.norm(run(model) - expected) / np.linalg.norm(expected)
    assert error <= 0.05


def test_sixteen_bits_lose_less_than_eight(tmp_path):
    errors = []
    for bits in (8, 16):
        model = save(on_grid(build("llama")), tmp_path / str(bits))
        expected = run(model)
        Rewriter(model).rewrite(bits)
        errors.append(np.abs(run(model) - expected).max())
    # Far less: seven bits more, of which two may drown in float32 elsewhere.
    assert errors[1] * 2**5 <= errors[0]


def test_places_for_adapters_become_inputs(tmp_path):
    model = save(build("llama"), tmp_path / "out", slots=Slots(low_rank=True))
    names = Rewriter(model).rewrite()
    assert names
    assert names <= {i.name for i in model.graph.input}
    assert not names & {t.name for t in model.graph.initializer}
    plain = run(model)
    rng = np.random.default_rng(0)
    shapes = {
        i.name: [d.dim_value or 2 for d in i.type.tensor_type.shape.dim]
        for i in model.graph.input
        if i.name in names
    }
    filled = {
        k: rng.normal(size=s).astype("float32") for k, s in shapes.items()
    }
    assert not np.allclose(run(model, **filled), plain)
