"""Layers stored in fewer bits compute with exactly what is stored."""

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from described import VOCABULARY
from described import build
from stepping import Stepping

from keras_peft.export.blockwise import Blockwise
from keras_peft.export.blockwise import quantize
from keras_peft.export.genai import families
from keras_peft.export.genai import graph
from keras_peft.export.genai.decoder import Linear
from keras_peft.export.genai.decoder import Table
from keras_peft.export.genai.decoder import parts
from keras_peft.export.genai.storage import Float

IDS = np.random.default_rng(0).integers(1, VOCABULARY, (2, 12))


def _plan(decoder, store):
    plan = {part.key: store(part.kernel) for part in parts(decoder, Linear)}
    return {**plan, decoder.table.key: store(decoder.table.rows.T)}


def _stored(decoder, plan):
    """The decoder with the kernels that its plan stands for."""

    def replace(part):
        if isinstance(part, Linear):
            return dataclasses.replace(part, kernel=plan[part.key].kernel())
        if isinstance(part, Table) and part.key in plan:
            return dataclasses.replace(part, rows=plan[part.key].kernel().T)
        if isinstance(part, tuple):
            return tuple(map(replace, part))
        if dataclasses.is_dataclass(part):
            fields = [field.name for field in dataclasses.fields(part)]
            new = {name: replace(getattr(part, name)) for name in fields}
            return dataclasses.replace(part, **new)
        return part

    return replace(decoder)


def _run(decoder, plan, folder):
    folder.mkdir()
    model = graph.build(decoder, plan)
    for node in model.graph:
        if node.op_type == "MatMulNBits":  # Inputs as they are, not in int8.
            node.attributes.add(ir.AttrInt64("accuracy_level", 1))
    graph.save(model, folder)
    return Stepping(folder / "model.onnx")(IDS, sizes=(7,))


# Hidden sizes: 64 is a multiple of the blocks, and 96 of the feed-forward
# layer is not one of 64.
@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neo_x", "llama", "llama_tied"])
def test_integers_stand_for_their_kernels(tmp_path, name, bits, block_size):
    decoder = families.describe(build(name))
    plan = _plan(decoder, lambda k: quantize(k, bits, block_size))
    found = _run(decoder, plan, tmp_path / "integers")
    expected = _run(_stored(decoder, plan), {}, tmp_path / "floats")
    exact = _run(decoder, {}, tmp_path / "exact")
    scale = np.abs(expected).max()
    # Float32 sums in another order.
    assert np.abs(found - expected).max() <= 2e-5 * scale
    assert np.abs(found - exact).max() > 1e-3 * scale


def test_zero_points_reach_the_head_and_the_rows(tmp_path):
    decoder = families.describe(build("llama_tied"))
    stored = quantize(decoder.table.rows.T, 4)
    moved = np.random.default_rng(0).integers(0, 16, stored.zero_points.shape)
    stored = dataclasses.replace(stored, zero_points=moved.astype("uint8"))
    rows = dataclasses.replace(decoder.table, rows=stored.kernel().T)
    expected = _run(
        dataclasses.replace(decoder, table=rows), {}, tmp_path / "floats"
    )
    found = _run(decoder, {decoder.table.key: stored}, tmp_path / "integers")
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


def test_projections_of_different_bits_stay_apart(tmp_path):
    decoder = families.describe(build("gpt2"))
    plan = _plan(decoder, lambda k: quantize(k, 8))
    key = decoder.blocks[0].attention.value
    plan[key.key] = quantize(key.kernel, 4)
    del plan[decoder.blocks[1].attention.query.key]
    kept = {
        part.key: plan.get(part.key, _Exact(part.kernel))
        for part in parts(decoder, Linear)
    }
    kept[decoder.table.key] = plan[decoder.table.key]
    found = _run(decoder, plan, tmp_path / "integers")
    expected = _run(_stored(decoder, kept), {}, tmp_path / "floats")
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


class _Exact:
    def __init__(self, kernel):
        self.kernel = lambda: kernel


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_float16_rounds_weights_and_nothing_else(tmp_path, name):
    decoder = families.describe(build(name))
    plan = _plan(decoder, lambda _: Float("float16"))
    kernels = _plan(
        decoder, lambda k: _Exact(k.astype("float16").astype("float32"))
    )
    found = _run(decoder, plan, tmp_path / "halves")
    expected = _run(_stored(decoder, kernels), {}, tmp_path / "floats")
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


def test_a_tied_table_is_stored_once(tmp_path):
    decoder = families.describe(build("llama_tied"))
    plan = _plan(decoder, lambda k: quantize(k, 8))
    graph.save(graph.build(decoder, plan, context_length=100), tmp_path)
    stored = sum(part.nbytes for part in plan.values())
    assert all(isinstance(part, Blockwise) for part in plan.values())
    data = (tmp_path / "model.onnx.data").stat().st_size
    # The rest: norms and tables of cosines, counted, and 64 bytes to align
    # each of less than a hundred tensors.
    rotary = 2 * 4 * 100 * 8
    norms = 5 * 64 * 4
    assert data <= stored + rotary + norms + 100 * 64
