"""A model and its graph with places for adapters, to compare both."""

import json

import numpy as np
import onnxruntime
from described import VOCABULARY
from described import logits

import keras_peft
from keras_peft.export.genai import adapter_file
from keras_peft.export.genai import adapters
from keras_peft.export.genai import config
from keras_peft.export.genai import families
from keras_peft.export.genai import graph
from keras_peft.export.genai.adapter_file import WithAdapter
from keras_peft.export.genai.decoder import Linear
from keras_peft.export.genai.decoder import parts
from keras_peft.export.genai.facts import facts_of
from keras_peft.export.genai.slots import BASE
from keras_peft.export.genai.slots import LAYERS
from keras_peft.export.genai.slots import Slots

# Some hundred float32 products summed in another order, in a few layers, each
# off by 2**-24, relative to the largest logit.
TOLERANCE = 2e-5
IDS = np.random.default_rng(7).integers(1, VOCABULARY, (2, 11))
PLACES = Slots(low_rank=True)


class Exported:
    """A model, and its graph in ONNX Runtime."""

    def __init__(self, model, folder, slots=PLACES, plan=None):
        self.model, self.folder = model, folder
        self.decoder = families.describe(self.model)
        graph.save(graph.build(self.decoder, plan, slots), folder)
        settings = config.genai_config(facts_of(self.decoder), 64)
        (folder / config.NAME).write_text(json.dumps(settings))
        path = str(folder / graph.FILE)
        self.session = onnxruntime.InferenceSession(path)
        self.said = self.session.get_modelmeta().custom_metadata_map

    def __call__(self, adapter=None, ids=IDS):
        feed = {
            i.name: np.zeros((len(ids), i.shape[1], 0, i.shape[3]), "float32")
            for i in self.session.get_inputs()
            if i.name.startswith("past")
        }
        feed["input_ids"], feed["attention_mask"] = ids, np.ones_like(ids)
        options = WithAdapter(self.session, adapter) if adapter else None
        return self.session.run(["logits"], feed, options)[0]

    def write(self, source, name="a"):
        """The adapter file of an adapter folder."""
        path = self.folder / f"{name}{adapter_file.SUFFIX}"
        change = adapters.read(self.model, source)
        parameters = adapters.parameters(self.decoder, self.places, change)
        adapter_file.write_file(path, parameters, int(self.said[BASE]))
        return path

    @property
    def places(self):
        return json.loads(self.said[LAYERS])

    @property
    def layers(self):
        """Paths of the layers that have a place."""
        keys = {key for keys in self.places.values() for key in keys}
        linear = parts(self.decoder, Linear)
        return sorted({part.path for part in linear if part.key in keys})


def trained(model, folder, method, seed=1, **how):
    """What Keras computes with a moved adapter, left in `folder`."""
    keras_peft.adapt(model, method, targets=how.pop("targets", None))
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        noise = rng.normal(0.0, 0.2, variable.shape).astype("float32")
        variable.assign_add(noise)
    expected = logits(model, IDS)
    keras_peft.save_adapter(model, folder, **how)
    keras_peft.remove(model)
    return expected


def close(found, expected):
    return np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()
