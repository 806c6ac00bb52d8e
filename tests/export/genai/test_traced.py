"""Graphs traced from keras-hub's own cache: a second way to the same logits."""

import functools
import json

import numpy as np
import onnx_ir as ir
import onnxruntime_genai
import pytest
from described import VOCABULARY
from described import build
from described import moved
from stepping import Stepping
from zoo import ZOO

from keras_peft.export import to_genai
from keras_peft.export.genai import cached
from keras_peft.export.genai import compare
from keras_peft.export.genai import families
from keras_peft.export.genai import graph
from keras_peft.export.genai import traced
from keras_peft.export.genai.shelf import Shelf
from keras_peft.export.genai.traced import Traced
from keras_peft.export.worker import TracingError

# As in test_families: two orders of summing, of the same products.
TOLERANCE = 2e-5
IDS = np.random.default_rng(0).integers(1, VOCABULARY, (2, 24))


@functools.cache
def _described(name):
    """A model of a family that is described, and its trace."""
    model = build(name)
    return model, Traced(model)


def _written(source, folder, quantize=None):
    """The files of a model in a new folder."""
    folder.mkdir()
    source.write(folder, 64, Shelf(source._model, None), quantize)
    return folder


def _logits(model, ids):
    return np.stack([compare.keras_logits(model, row) for row in ids])


def _distance(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def _bound(model):
    """What rounding adds up to, layer by layer; Gemma 3n has dozens."""
    return compare.bound(model, cached.read(model)[1])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("gemma2", marks=pytest.mark.slow),
        pytest.param("gpt2", marks=pytest.mark.slow),
        "llama",
    ],
)
def test_a_description_gives_the_logits_of_a_trace(name, tmp_path):
    model, source = _described(name)
    graph.save(graph.build(families.describe(model)), tmp_path)
    folder = _written(source, tmp_path / "traced")
    for sizes in ((24,), (1,)):
        found, expected = (
            Stepping(place / graph.FILE)(IDS, sizes=sizes)
            for place in (tmp_path, folder)
        )
        assert _distance(found, expected) <= TOLERANCE
    # Some tokens behind others: the described operator takes one row of such.
    found, expected = (
        Stepping(place / graph.FILE)(IDS[:1], sizes=(5, 9))
        for place in (tmp_path, folder)
    )
    assert _distance(found, expected) <= TOLERANCE


@pytest.fixture(scope="module", params=["Gemma3nCausalLM"])
def exported(request, tmp_path_factory):
    """A model of a family without description, its folder and its report."""
    model = moved(ZOO[request.param].build())
    # On JAX and TensorFlow, Gemma 3n's head is the table as it was when the
    # model was made, so it is made again.
    model = type(model)(backbone=model.backbone, preprocessor=None)
    folder = tmp_path_factory.mktemp("traced") / "out"
    report = to_genai(model, folder, context_length=32)
    return model, folder, report


def test_a_family_without_description_is_served(exported):
    model, folder, report = exported
    tolerance = _bound(model)
    assert report.final.relative <= tolerance < 1e-4
    assert traced.NOTE in report.notes
    assert traced.NOTE in (folder / "README.md").read_text()
    ids = IDS % model.output.shape[-1]
    stepping = Stepping(folder / graph.FILE)
    for sizes in ((24,), (1,), (5, 9)):
        found = stepping(ids, sizes=sizes)
        assert _distance(found, _logits(model, ids)) <= tolerance


def test_padding_is_refused_by_the_graph(exported):
    _, folder, _ = exported
    stepping = Stepping(folder / graph.FILE)
    for place in (0, 5):
        mask = np.ones((2, 6), int)
        mask[1, place] = 0
        with pytest.raises(Exception, match=traced.GUARD):
            stepping(IDS[:, :6] % 50, mask, sizes=(6,))


def _generated(folder, rows):
    model = onnxruntime_genai.Model(str(folder))
    options = onnxruntime_genai.GeneratorParams(model)
    options.set_search_options(max_length=16, batch_size=len(rows))
    generator = onnxruntime_genai.Generator(model, options)
    generator.append_tokens(np.array(rows, "int32"))
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(n) for n in range(len(rows))]


def test_the_runtime_answers_batches_of_equal_lengths_alone(exported):
    model, folder, _ = exported
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"] |= {"pad_token_id": 0, "eos_token_id": 0}
    (folder / "genai_config.json").write_text(json.dumps(config))
    rows = [[7, 3, 9, 1], [5, 6, 7, 2]]
    for row, answer in zip(rows, _generated(folder, rows), strict=True):
        assert list(answer[:4]) == row
        found = _logits(model, [answer[:-1]])[0, 3:]
        chosen = found[np.arange(len(found)), answer[4:]]
        # The most likely one, or as likely up to rounding.
        assert (found.max(-1) - chosen <= 1e-4 * np.abs(found).max()).all()
    with pytest.raises(Exception, match=traced.GUARD):
        _generated(folder, [[7, 3, 9, 1], [5, 6, 0, 0]])


def test_fewer_bits_take_fewer_bytes_and_cost_more(tmp_path):
    model, source = _described("llama")
    expected = _logits(model, IDS)
    sizes, errors = [], []
    for quantize in (None, "float16", "int8", "int4"):
        folder = _written(source, tmp_path / str(quantize), quantize)
        found = Stepping(folder / graph.FILE)(IDS, sizes=(24,))
        sizes.append((folder / graph.DATA).stat().st_size)
        errors.append(_distance(found, expected))
        operators = {n.op_type for n in ir.load(folder / graph.FILE).graph}
        assert ("MatMulNBits" in operators) == (quantize in ("int8", "int4"))
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)


# -- What is refused ---------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("RWKV7CausalLM", "cannot be traced"),
        ("Qwen3_5CausalLM", "not one array"),
        ("PaliGemmaCausalLM", "text alone.*images"),
    ],
)
def test_other_caches_and_other_inputs_are_refused(name, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        to_genai(ZOO[name].build(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapters": {"formal": "formal"}}, "Merge one adapter"),
        ({"quantize": "int4", "calibration": ["text"]}, "as `evaluation`"),
    ],
)
def test_what_needs_a_description_is_refused(options, message, tmp_path):
    model = ZOO["Gemma4CausalLM"].build()
    with pytest.raises(ValueError, match=message):
        to_genai(model, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_cache_that_no_tracer_takes_is_refused(tmp_path):
    # Torch fixes the length of Gemma 4's caches, TensorFlow leaves an operator.
    model = ZOO["Gemma4CausalLM"].build()
    with pytest.raises(TracingError, match="that ONNX does not have"):
        to_genai(model, tmp_path / "out", context_length=32)
    assert not list(tmp_path.iterdir())
