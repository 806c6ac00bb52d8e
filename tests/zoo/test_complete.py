import inspect

import keras_hub
import pytest

from zoo import ZOO


def _classes():
    """Names of all that keras-hub exports, but for what only others extend."""
    models = keras_hub.models
    abstract = {models.Backbone, models.FeaturePyramidBackbone, models.Task}
    for name, kind in inspect.getmembers(models, inspect.isclass):
        if kind in abstract or not issubclass(
            kind, (models.Backbone, models.Task)
        ):
            continue
        if issubclass(kind, models.Task) and kind.backbone_cls is None:
            continue
        yield name, kind


@pytest.mark.slice
def test_every_class_of_keras_hub_is_in_the_zoo():
    known = {getattr(keras_hub.models, case.kind) for case in ZOO.values()}
    missing = {kind.__name__ for _, kind in _classes() if kind not in known}
    assert not missing
