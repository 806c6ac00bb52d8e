"""Adapters as a part of an exported graph."""

import keras

from keras_peft import base_format
from keras_peft import layer_tree


def adapter_problems(model: keras.Model) -> list[str]:
    """What keeps `model` from being exported with the adapters it carries.

    Adapters that can be merged cost nothing once they are; only the others,
    which are no change of weights, become operators of the graph.
    """
    adapters: dict[str, list[keras.Layer]] = {}
    for _, layer in layer_tree.adapted_layers(model):
        for name, adapter in layer.adapters.items():
            adapters.setdefault(name, []).append(adapter)
    active = [n for n, parts in adapters.items() if any(map(_acts, parts))]
    idle = [name for name in adapters if name not in active]
    foldable = [n for n in active if all(a.mergeable for a in adapters[n])]
    in_graph = [name for name in active if name not in foldable]
    if foldable and in_graph:
        return [
            "Adapters that can be merged are active beside others that "
            "cannot. Choose one kind with `keras_peft.set_adapter`; to have "
            "both, merge the first kind before the second is added and "
            f"trained. Received: mergeable {foldable}, others {in_graph}"
        ]
    if foldable:
        return [
            "The model carries adapters; a file for a device holds plain "
            "layers. Call `keras_peft.merge(model)` first; "
            "`keras_peft.unmerge(model)` brings the adapters back. "
            f"Received: adapters {foldable}"
        ]
    if idle:
        return [
            "Adapters that take no part would stay in the graph. Drop each "
            "with `keras_peft.remove(model, name)`, or choose it with "
            f"`keras_peft.set_adapter`. Received: inactive adapters {idle}"
        ]
    if packed := base_format.formats(model):
        form = next(iter(packed.values()))
        return [
            f"The base is in {form}, as it was trained over, and a file for "
            "a device is quantized from kernels in floating point. Load the "
            "adapter into the same model with such kernels, with "
            "`keras_peft.load_adapter(model, folder, base=None)`. Received: "
            f"{len(packed)} layers in {form}"
        ]
    return []


def taken_positions(model: keras.Model) -> int:
    """How many positions of a text model its adapters take."""
    return max(
        (
            adapter.positions
            for _, layer in layer_tree.adapted_layers(model)
            for adapter in layer.adapters.values()
            if adapter.present
        ),
        default=0,
    )


def _acts(adapter: keras.Layer) -> bool:
    return bool(keras.ops.convert_to_numpy(adapter.strength) != 0)
