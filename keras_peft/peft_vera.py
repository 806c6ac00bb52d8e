"""VeRA in PEFT's files: one pair of projections, two vectors per module."""

from keras_peft.kernels import kernel_of
from keras_peft.methods.vera import VeRA
from keras_peft.peft_codec import COMMON
from keras_peft.peft_codec import is_convolution
from keras_peft.peft_codec import is_embedding

PEFT_TYPE = "VERA"
METHOD = VeRA
SUFFIXES = ("vera_lambda_b", "vera_lambda_d")
_A, _B = "base_model.vera_A", "base_model.vera_B"
SHARED = (_A, _B)
# How the projections were drawn is no matter: they are there.
KNOWN = (
    *COMMON,
    *("r", "projection_prng_key", "save_projection", "vera_dropout"),
    *("d_initial", "init_weights", "bias"),
)


def read(reader):
    """`(method, {path: {weight: array}})`; notes what is wrong."""
    rank = reader.config.get("r", 256)
    if reader.config.get("bias", "none") != "none":
        reader.wrong.append("it trained biases of the base")
    if _A not in reader.shared or _B not in reader.shared:
        reader.wrong.append(
            "the projections are not there (PEFT's `save_projection=False`), "
            "and only torch could draw them again"
        )
    adapters = {}
    for module in reader.modules:
        found = reader.whole_part(module)
        if found is None:
            continue
        path, part = found
        _, outputs = part.sizes
        b = reader.take(module, "vera_lambda_b", (outputs,))
        d = reader.take(module, "vera_lambda_d", (rank,))
        adapters[path] = {"vera_lambda_b": b, "vera_lambda_d": d}
    if reader.wrong or not adapters:
        return None
    paths = [path for path in reader.names.layers if path in adapters]
    kernels = [kernel_of(reader.names.layers[path]) for path in paths]
    inputs = max(kernel.inputs for kernel in kernels)
    outputs = max(kernel.outputs for kernel in kernels)
    a = reader.take_shared(_A, (rank, inputs))
    b = reader.take_shared(_B, (outputs, rank))
    if a is None or b is None:
        return None
    # With the first of the layers, as in keras_peft's own folders.
    adapters[paths[0]] |= {"vera_projection_a": a.T, "vera_projection_b": b.T}
    d_initial = reader.config.get("d_initial", 0.1)
    return VeRA(rank=rank, d_initial=d_initial), adapters


def write(writer):
    """`(settings, {module: {suffix: array}})`; notes what cannot be said."""
    modules = {}
    for module, path, _ in writer.whole_parts(plain=False):
        layer = writer.names.layers[path]
        if is_embedding(layer) or is_convolution(layer):
            writer.wrong.append(f"PEFT has no VeRA for what `{module}` is")
        weights = writer.weights(path)
        modules[module] = {key: weights[key] for key in SUFFIXES}
        if "vera_projection_a" in weights:
            writer.shared[_A] = weights["vera_projection_a"].T
            writer.shared[_B] = weights["vera_projection_b"].T
    settings = {
        "r": writer.method.rank,
        "d_initial": writer.method.d_initial,
        "save_projection": True,
        "fan_in_fan_out": any(
            part.transposed
            for parts in writer.modules.values()
            for part in parts.values()
        ),
    }
    return settings, modules
