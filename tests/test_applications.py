"""The architectures of `keras.applications`, from adapt to ONNX."""

import dataclasses

import keras
import numpy as np
import pytest

import keras_peft
from keras_peft import adapter_state
from keras_peft.export.build import build_onnx

applications = keras.applications


@dataclasses.dataclass(frozen=True)
class Application:
    """An architecture, and the smallest image with its classifier on top.

    Attributes:
        size: Pixels of a side.
        options: Arguments of the function that builds it.
    """

    size: int = 32
    options: dict[str, object] = dataclasses.field(default_factory=dict)

    def build(self, name):
        keras.utils.set_random_seed(0)
        model = getattr(applications, name)(
            weights=None,
            classes=5,
            classifier_activation=None,
            input_shape=(self.size, self.size, 3),
            **self.options,
        )
        _measure(model, self.images(16))
        return model

    def images(self, count):
        rng = np.random.default_rng(count)
        shape = (count, self.size, self.size, 3)
        return rng.normal(size=shape).astype("float32")


def _measure(model, images):
    """Gives batch normalization statistics: without, signals fade away."""
    norms = [
        layer
        for layer in model.layers
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = 0.0
    model(images, training=True)
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum


APPLICATIONS = {
    "MobileNetV3Small": Application(),
    "MobileNetV2": Application(options=dict(alpha=0.35)),
    "MobileNet": Application(options=dict(alpha=0.25)),
    "EfficientNetB0": Application(),
    "EfficientNetV2B0": Application(),
    "ResNet50": Application(),
    "ResNet50V2": Application(),
    "ConvNeXtTiny": Application(),
    "DenseNet121": Application(),
    "NASNetMobile": Application(),
    "Xception": Application(size=71),
    "InceptionV3": Application(size=75),
    "InceptionResNetV2": Application(size=75),
    "VGG16": Application(),
}
QUICK = ("MobileNetV3Small", "MobileNet")


def _outputs(model, images):
    return keras.ops.convert_to_numpy(model(images, training=False))


def _learned(model):
    return [
        keras.ops.convert_to_numpy(variable)
        for leaf in adapter_state.leaves(model, "default").values()
        for variable in leaf.learned
    ]


@pytest.mark.filterwarnings("ignore")  # Tracers warn of themselves.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name in APPLICATIONS
    ],
)
def test_an_application_adapts_trains_merges_and_exports(name):
    if name == "NASNetMobile" and keras.config.backend() == "torch":
        pytest.skip("Keras has no NASNet on torch")
    application = APPLICATIONS[name]
    model = application.build(name)
    images = application.images(4)
    keras_peft.adapt(model, keras_peft.LoRA(rank=4))
    before = _learned(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # The first factor moves once the second is no longer zero.
    model.compile(keras.optimizers.Adam(1e-3), loss)
    model.fit(images, np.arange(4), batch_size=4, epochs=2, verbose=0)
    moved = [
        (a != b).any() for a, b in zip(before, _learned(model), strict=True)
    ]
    assert all(moved), f"{moved.count(False)} of {len(moved)} stay"
    adapted = _outputs(model, images)
    report = keras_peft.merge(model)
    # Sums of some hundred products, in another order in each merged layer.
    bound = 2.0**-23 * 256 * len(report.errors)
    error = np.abs(_outputs(model, images) - adapted).max()
    assert error <= bound * np.abs(adapted).max()
    # Raises unless the graph equals the model, for other batches too.
    build_onnx(model)
