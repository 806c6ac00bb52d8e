"""Prefix tuning in PEFT's files: keys and values, layer after layer."""

import math

import numpy as np

from keras_peft.methods.prefix_tuning import PrefixTuning
from keras_peft.methods.virtual_tokens import encodes_and_decodes
from keras_peft.peft_prompt import KEY
from keras_peft.peft_prompt import count_of
from keras_peft.peft_prompt import find

PEFT_TYPE = "PREFIX_TUNING"
METHOD = PrefixTuning
SUFFIXES = ()
SHARED = (KEY,)
# A network that computed the prefix is not in the file, its outputs are.
KNOWN = (
    *("num_virtual_tokens", "token_dim", "num_transformer_submodules"),
    *("num_attention_heads", "num_layers", "modules_to_save"),
    *("prefix_projection", "encoder_hidden_size", "init_weights"),
)


def read(reader):
    """`(method, {path: {weight: array}})`; notes what is wrong."""
    count, against = count_of(reader), objection(reader.names)
    if count is None or against:
        reader.wrong += [against] if against else []
        return None
    method = PrefixTuning(num_tokens=count)
    adapters = find(reader.names, method)
    path = next(path for path, shapes in adapters.items() if shapes)
    shape = adapters[path]["prefix"]
    flat = (count, math.prod(shape[1:]))
    prefix = reader.take_shared(KEY, flat)
    if prefix is None:
        return None
    prefix = prefix.reshape(shape)
    order = _key_order(reader.names, shape[-1])
    prefix[:, :, 0] = prefix[:, :, 0][..., order]
    found = {path: {} for path in adapters}
    found[path]["prefix"] = prefix
    return method, found


def objection(names):
    """Why a prefix means something else in PEFT, or `None`."""
    if encodes_and_decodes(names.backbone):
        return (
            "in PEFT an encoder has no prefix, and the decoder's attention to "
            "it the same as that to its own text"
        )
    return None


def _key_order(names, size):
    """The feature there of each feature of a rotated key here."""
    order = np.arange(size)
    if names.family != "gemma":
        return order
    # keras-hub puts the two halves of a head side by side as it rotates.
    return order.reshape(2, -1).T.ravel()


def write(writer):
    """`(settings, {})`; notes what cannot be said."""
    path, leaf = next((p, la) for p, la in writer.leaves.items() if la.kept)
    weights = writer.weights(path)
    against = objection(writer.names)
    if against:
        writer.wrong.append(against)
        return None
    if "prefix" not in weights:
        writer.wrong.append(
            "the network that computes the prefix (`hidden_dim`) is no part "
            "of PEFT's files"
        )
        return None
    prefix = weights["prefix"].copy()
    tokens, layers, _, heads, size = prefix.shape
    order = np.argsort(_key_order(writer.names, size))
    prefix[:, :, 0] = prefix[:, :, 0][..., order]
    writer.shared[KEY] = prefix.reshape(tokens, -1)
    settings = {
        "task_type": writer.names.task or "FEATURE_EXTRACTION",
        "num_virtual_tokens": tokens,
        "num_layers": layers,
        "token_dim": heads * size,
        "num_attention_heads": heads,
    }
    return settings, {}
