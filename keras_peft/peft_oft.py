"""OFT in PEFT's files: the upper triangle of each block, row by row."""

import numpy as np

from keras_peft.methods.oft import OFT
from keras_peft.methods.rotation import block_size_of
from keras_peft.peft_codec import COMMON
from keras_peft.peft_codec import is_convolution
from keras_peft.peft_codec import is_embedding

PEFT_TYPE = "OFT"
METHOD = OFT
SUFFIXES = ("oft_R.weight",)
SHARED = ()
# `eps` is of `coft`, which bounds the rotations and is not known here.
KNOWN = (
    *COMMON,
    *("r", "oft_block_size", "block_share", "eps", "bias", "init_weights"),
    *("use_cayley_neumann", "num_cayley_neumann_terms", "module_dropout"),
)


def read(reader):
    """`(method, {path: {weight: array}})`; notes what is wrong."""
    config = reader.config
    if config.get("bias", "none") != "none":
        reader.wrong.append("it trained biases of the base")
    neumann = config.get("use_cayley_neumann", True)
    size = config.get("oft_block_size", 32)
    method = OFT(
        block_size=size or 32,
        num_blocks=None if size else config.get("r"),
        cayley="neumann" if neumann else "exact",
        terms=config.get("num_cayley_neumann_terms", 5),
        block_share=config.get("block_share", False),
    )
    adapters = {}
    for module in reader.modules:
        for path, part in reader.parts(module).items():
            layer = reader.names.layers[path]
            if not _in_order(part) or is_convolution(layer):
                reader.wrong.append(f"`{module}` has its inputs otherwise here")
                continue
            objection = method.objection(path, layer)
            if objection:
                reader.wrong.append(f"`{path}`: {objection}")
                continue
            shape = method.shapes(path, layer)["oft_rotation"]
            value = reader.take(module, "oft_R.weight", shape)
            adapters[path] = {"oft_rotation": value}
    return None if reader.wrong else (method, adapters)


def _in_order(part):
    return np.array_equal(part.inputs, np.arange(part.sizes[0]))


def write(writer):
    """`(settings, {module: {suffix: array}})`; notes what cannot be said."""
    method, modules, sizes = writer.method, {}, set()
    for module, path, _ in writer.whole_parts():
        layer = writer.names.layers[path]
        if is_embedding(layer) or is_convolution(layer):
            writer.wrong.append(f"`{module}` is no linear module")
        sizes.add(block_size_of(method, layer))
        rotation = writer.weights(path)["oft_rotation"]
        modules[module] = {"oft_R.weight": rotation}
    settings = {
        "r": method.num_blocks or 0,
        "oft_block_size": 0 if method.num_blocks else method.block_size,
        "block_share": method.block_share,
        "use_cayley_neumann": method.cayley == "neumann",
        "num_cayley_neumann_terms": method.terms,
    }
    return settings, modules
