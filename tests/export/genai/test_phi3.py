"""Phi-3 turns the tokens of long texts by other frequencies."""

import keras
import numpy as np
import pytest
from described import VOCABULARY
from described import logits
from described import moved
from described import phi3_switching
from stepping import Stepping

from keras_peft.export.genai import families
from keras_peft.export.genai import graph

# As in test_families.py: two orders of summing.
TOLERANCE = 2e-5
SHORT, LENGTH = 16, 30
IDS = np.random.default_rng(0).integers(1, VOCABULARY, (1, LENGTH))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = moved(phi3_switching())
    folder = tmp_path_factory.mktemp("graph")
    graph.save(graph.build(families.describe(model)), folder)
    return model, Stepping(folder / "model.onnx")


def _compare(found, expected):
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("length", [SHORT - 1, SHORT, SHORT + 1, LENGTH])
def test_the_length_of_a_prompt_chooses_the_frequencies(exported, length):
    model, stepping = exported
    ids = IDS[:, :length]
    _compare(stepping(ids, sizes=(length,)), logits(model, ids))


def test_a_long_prompt_goes_on_with_those_of_long_texts(exported):
    model, stepping = exported
    found = stepping(IDS, sizes=(SHORT + 1,))
    _compare(found[:, SHORT + 1 :], logits(model, IDS)[:, SHORT + 1 :])


def test_rows_of_several_lengths_go_on_where_their_text_ends(exported):
    model, stepping = exported
    ids = np.repeat(IDS, 2, axis=0)
    mask = np.ones_like(ids)
    # The first row's text is 4 tokens shorter than the prompts' 20.
    mask[0, 16:20] = 0
    found = stepping(ids, mask, sizes=(20,))
    text = np.delete(IDS, range(16, 20), axis=1)
    _compare(np.delete(found[:1], range(16, 20), axis=1), logits(model, text))
    _compare(found[1:], logits(model, IDS))


def test_a_text_that_becomes_long_keeps_its_keys_as_they_are(exported):
    """As in Keras' own cache; onnxruntime-genai reads such a text anew."""
    model, stepping = exported
    found = stepping(IDS, sizes=(SHORT - 2,))
    cache = keras.ops.zeros((1, 2, 2, LENGTH, 2, 16))
    parts, start = [], 0
    for stop in (SHORT - 2, *range(SHORT - 1, LENGTH + 1)):
        ids = IDS[:, start:stop].astype("int32")
        part, _, cache = model.call_with_cache(ids, cache, start)
        parts.append(keras.ops.convert_to_numpy(part))
        start = stop
    _compare(found, np.concatenate(parts, axis=1))
    whole = logits(model, IDS)
    assert np.abs(found - whole).max() > 1e-2 * np.abs(whole).max()
