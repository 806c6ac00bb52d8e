"""LoKr in PEFT's files: `kron(w1, w2)`, both `[outputs, inputs]`."""

from keras_peft.methods.lokr import LoKr
from keras_peft.peft_codec import COMMON
from keras_peft.peft_codec import is_convolution
from keras_peft.peft_codec import ranked
from keras_peft.peft_codec import ranked_settings

PEFT_TYPE = "LOKR"
METHOD = LoKr
# PEFT's name of each weight here; the factors of a product change places.
_NAMES = {
    "lokr_w1": "lokr_w1",
    "lokr_w1_a": "lokr_w1_b",
    "lokr_w1_b": "lokr_w1_a",
    "lokr_w2": "lokr_w2",
    "lokr_w2_a": "lokr_w2_b",
    "lokr_w2_b": "lokr_w2_a",
}
SUFFIXES = tuple(_NAMES.values())
SHARED = ()
KNOWN = (
    *COMMON,
    *("r", "alpha", "rank_pattern", "alpha_pattern", "init_weights"),
    *("decompose_both", "decompose_factor"),
    *("rank_dropout", "module_dropout", "rank_dropout_scale"),
)


def read(reader):
    """`(method, {path: {weight: array}})`; notes what is wrong."""
    paths, ranks, scales = {}, {}, {}
    for module in reader.modules:
        found = reader.whole_part(module)
        if found is None:
            continue
        path, _ = found
        if is_convolution(reader.names.layers[path]):
            reader.wrong.append(f"`{module}` is a convolution")
        paths[path] = module
        ranks[path] = reader.by_pattern("rank_pattern", module, "r")
        alpha = reader.by_pattern("alpha_pattern", module, "alpha")
        scales[path] = alpha / ranks[path]
    if reader.wrong:
        return None
    method = LoKr(
        decompose_both=reader.config.get("decompose_both", False),
        decompose_factor=reader.config.get("decompose_factor", -1),
        **ranked(ranks, scales),
    )
    adapters = {}
    for path, module in paths.items():
        shapes = method.shapes(path, reader.names.layers[path])
        found = {
            key: reader.take(module, _NAMES[key], shape[::-1])
            for key, shape in shapes.items()
        }
        if None not in [None if v is None else 0 for v in found.values()]:
            adapters[path] = {key: v.T for key, v in found.items()}
    return None if reader.wrong else (method, adapters)


def write(writer):
    """`(settings, {module: {suffix: array}})`; notes what cannot be said."""
    modules, ranks, scales = {}, {}, {}
    for module, path, _ in writer.whole_parts():
        if is_convolution(writer.names.layers[path]):
            writer.wrong.append(f"`{path}` is a convolution")
        ranks[module] = writer.method.rank_of(path)
        scales[module] = writer.method.scale_of(path)
        modules[module] = {
            _NAMES[key]: value.T for key, value in writer.weights(path).items()
        }
    if writer.wrong:
        return None
    settings = ranked_settings(writer.names, ranks, scales)
    settings["decompose_both"] = writer.method.decompose_both
    settings["decompose_factor"] = writer.method.decompose_factor
    return settings, modules
