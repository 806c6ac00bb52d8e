"""Prompts and prefixes over one exported base, from adapter files."""

import numpy as np
import onnxruntime_genai
import pytest
from adapted import IDS
from adapted import PLACES
from adapted import Exported
from adapted import close
from adapted import trained
from described import FAMILIES
from described import build
from described import logits

import keras_peft
from keras_peft.export.genai.decoder import Rotary
from keras_peft.export.genai.decoder import parts
from keras_peft.export.genai.slots import Slots

TOKENS = 5
METHODS = {
    "prompt": keras_peft.PromptTuning(TOKENS),
    "p_tuning": keras_peft.PTuning(TOKENS),
    "prefix": keras_peft.PrefixTuning(TOKENS),
    "prefix_network": keras_peft.PrefixTuning(TOKENS, hidden_dim=6),
}
ALL = Slots(low_rank=True, prompts=True, prefixes=True)
# Any tokens stand where the virtual ones will: here, the text's first.
BEFORE = np.concatenate([IDS[:, :TOKENS], IDS], axis=1)


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("virtual")
    return Exported(build(request.param), folder, ALL)


@pytest.mark.parametrize("name", METHODS)
def test_virtual_tokens_stand_before_the_text(name, exported, tmp_path):
    expected = trained(exported.model, tmp_path / "a", METHODS[name])
    rotaries = parts(exported.decoder, Rotary)
    if "prefix" in name and any(r.long is not None for r in rotaries):
        with pytest.raises(ValueError, match="depend on how long a text is"):
            exported.write(tmp_path / "a")
        return
    path = exported.write(tmp_path / "a")
    assert close(exported(path, BEFORE)[:, TOKENS:], expected)


def test_places_for_virtual_tokens_change_nothing(exported, tmp_path):
    plain = Exported(exported.model, tmp_path, PLACES)
    assert close(exported(), plain())


def test_onnxruntime_genai_goes_on_after_a_prefix(tmp_path):
    exported = Exported(build("llama"), tmp_path, ALL)
    method = METHODS["prefix"]
    expected = trained(exported.model, tmp_path / "a", method)
    runtime = onnxruntime_genai.Model(str(tmp_path))
    shelf = onnxruntime_genai.Adapters(runtime)
    shelf.load(str(exported.write(tmp_path / "a")), "a")
    parameters = onnxruntime_genai.GeneratorParams(runtime)
    parameters.set_search_options(max_length=40)
    generator = onnxruntime_genai.Generator(runtime, parameters)
    generator.set_active_adapter(shelf, "a")
    generator.append_tokens(BEFORE[0].astype("int32"))
    found = np.asarray(generator.get_logits())[0, -1]
    assert close(found, expected[0, -1])
    generator.generate_next_token()
    found = np.asarray(generator.get_logits())[0, -1]
    keras_peft.load_adapter(exported.model, tmp_path / "a")
    longer = [[*IDS[0], generator.get_sequence(0)[-1]]]
    assert close(found, logits(exported.model, longer)[0, -1])
