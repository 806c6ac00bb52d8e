"""Every family's graph computes what Keras computes, however it is fed."""

import numpy as np
import pytest
from described import FAMILIES
from described import VOCABULARY
from described import build
from described import logits
from stepping import Stepping

from keras_peft.export.genai import families
from keras_peft.export.genai import graph

# Two orders of summing some hundred float32 products in a few layers, each
# off by 2**-24, relative to the largest logit.
TOLERANCE = 2e-5
LENGTH = 24


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request, tmp_path_factory):
    model = build(request.param)
    folder = tmp_path_factory.mktemp("graph")
    graph.save(graph.build(families.describe(model)), folder)
    return model, Stepping(folder / "model.onnx")


def _tokens(rows=2, length=LENGTH):
    rng = np.random.default_rng(rows + length)
    return rng.integers(1, VOCABULARY, (rows, length))


def _compare(found, expected):
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() <= TOLERANCE * scale


# Several rows at once go on by one token each: the operator takes no more.
@pytest.mark.parametrize(
    ("rows", "sizes"), [(2, (24,)), (2, (1,)), (3, (7,)), (1, (5, 9))]
)
def test_steps_of_any_size_give_the_logits_of_keras(exported, rows, sizes):
    model, stepping = exported
    ids = _tokens(rows)
    _compare(stepping(ids, sizes=sizes), logits(model, ids))


def test_padding_on_the_left_changes_no_logit(exported):
    model, stepping = exported
    ids, mask = _tokens(), np.ones((2, LENGTH), int)
    ids[0, :6] = mask[0, :6] = 0
    found = stepping(ids, mask, sizes=(10,))
    assert np.isfinite(found).all()
    _compare(found[:1, 6:], logits(model, ids[:1, 6:]))
    _compare(found[1:], logits(model, ids[1:]))


def test_padding_on_the_right_is_overwritten(exported):
    model, stepping = exported
    ids, mask = _tokens(), np.ones((2, LENGTH), int)
    # The first row's text is 4 tokens shorter than the prompts' 10.
    ids[0, 6:10] = mask[0, 6:10] = 0
    found = stepping(ids, mask, sizes=(10,))
    text = np.delete(ids[:1], range(6, 10), axis=1)
    _compare(np.delete(found[:1], range(6, 10), axis=1), logits(model, text))
    _compare(found[1:], logits(model, ids[1:]))


def test_the_cache_grows_far_beyond_the_prompt(exported):
    model, stepping = exported
    ids = _tokens(rows=1, length=90)
    _compare(stepping(ids, sizes=(3,)), logits(model, ids))
