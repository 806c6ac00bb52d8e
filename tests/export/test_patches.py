"""Every patch of a tracing library is still needed, and does its work."""

import contextlib
from typing import Any

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
from ai_edge_litert.interpreter import Interpreter
from zoo import ZOO

from keras_peft.export import patches
from keras_peft.export.litert import flatbuffer
from keras_peft.export.patches import delta_rule
from keras_peft.export.patches import erfc
from keras_peft.export.patches import erfinv
from keras_peft.export.patches import fourier
from keras_peft.export.patches import fused_attention
from keras_peft.export.patches import grouped_convolution
from keras_peft.export.patches import integer_arithmetic
from keras_peft.export.patches import masked_keys
from keras_peft.export.patches import new_axis
from keras_peft.export.patches import outer_product
from keras_peft.export.patches import pixel_attention
from keras_peft.export.patches import plain_product
from keras_peft.export.patches import recurrence
from keras_peft.export.patches import roll
from keras_peft.export.patches import short_prompt
from keras_peft.export.patches import stored_positions
from keras_peft.export.patches import symbolic_integer
from keras_peft.export.patches import symbolic_repeat
from keras_peft.export.patches import symbolic_size
from keras_peft.export.patches import take_along_axis
from keras_peft.export.patches import whole_products
from keras_peft.export.signature import read_signature


def _counting():
    """The position of every token, as an array of a free length."""

    @keras.saving.register_keras_serializable("tests")
    class Positions(keras.layers.Layer):
        def call(self, inputs):
            positions = keras.ops.arange(inputs.shape[1])
            return inputs + keras.ops.cast(positions, inputs.dtype)

    inputs = keras.Input((None,))
    return keras.Model(inputs, Positions()(inputs))


def _repeating():
    """Every token beside every other one."""

    @keras.saving.register_keras_serializable("tests")
    class Pairs(keras.layers.Layer):
        def call(self, inputs):
            return keras.ops.repeat(inputs[..., None], inputs.shape[1], axis=-1)

    inputs = keras.Input((None,))
    return keras.Model(inputs, Pairs()(inputs))


def _taking():
    """What stands at the same two places of every row, chosen by its sign."""

    @keras.saving.register_keras_serializable("tests")
    class Places(keras.layers.Layer):
        def call(self, inputs):
            places = keras.ops.cast(inputs[:, :2] > 0, "int32")
            return keras.ops.take_along_axis(inputs, places, axis=1)

    inputs = keras.Input((None,))
    return keras.Model(inputs, Places()(inputs))


def _quantiles():
    """The inverse of the error function, nearly to its ends."""

    @keras.saving.register_keras_serializable("tests")
    class Quantile(keras.layers.Layer):
        def call(self, inputs):
            return keras.ops.erfinv(0.999 * keras.ops.tanh(inputs))

    inputs = keras.Input((None,))
    return keras.Model(inputs, Quantile()(inputs))


def _mixing():
    """The real part of a Fourier transform over rows and columns."""

    @keras.saving.register_keras_serializable("tests")
    class Mixing(keras.layers.Layer):
        def call(self, inputs):
            square = inputs[:, :, None] * inputs[:, None]
            return keras.ops.fft2((square, keras.ops.zeros_like(square)))[0]

    inputs = keras.Input((None,))
    return keras.Model(inputs, Mixing()(inputs))


def _convolution():
    inputs = keras.Input((6, 6, 4))
    return keras.Model(inputs, keras.layers.Conv2D(4, 3, groups=2)(inputs))


def _gelu():
    inputs = keras.Input((4,))
    return keras.Model(inputs, keras.ops.gelu(inputs * 1.0, approximate=False))


def _sequence():
    inputs = keras.Input((None, 4))
    x = keras.layers.Dense(6)(inputs)
    x = keras.layers.EinsumDense("abc,cde->abde", (None, 2, 3))(x)
    return keras.Model(inputs, x)


def _larger():
    inputs = keras.Input((None, None, 3))
    layer = keras.layers.UpSampling2D(2, interpolation="bilinear")
    return keras.Model(inputs, layer(inputs))


def _recurrent():
    """Masked rows, read backwards too."""
    inputs = keras.Input((None, 4))
    masked = keras.layers.Masking()(inputs)
    layer = keras.layers.GRU(3, return_sequences=True)
    return keras.Model(inputs, keras.layers.Bidirectional(layer)(masked))


def _distances():
    """Signs and magnitudes of 64-bit integers."""

    @keras.saving.register_keras_serializable("tests")
    class Distances(keras.layers.Layer):
        def call(self, inputs):
            far = keras.ops.cast(inputs * 9, "int64")
            far = keras.ops.sign(far) * (1 + keras.ops.abs(far))
            return keras.ops.cast(far, inputs.dtype)

    inputs = keras.Input((None,))
    return keras.Model(inputs, Distances()(inputs))


def _axes():
    """Five axes, one of them new and three of a free size."""

    @keras.saving.register_keras_serializable("tests")
    class Axes(keras.layers.Layer):
        def call(self, inputs):
            square = inputs[..., None] * inputs[:, None]
            return (square[:, None, ..., None] + 1)[:, 0, :, :, 0]

    inputs = keras.Input((None,))
    return keras.Model(inputs, Axes()(inputs))


def _angles():
    """Every number times three others."""

    @keras.saving.register_keras_serializable("tests")
    class Angles(keras.layers.Layer):
        def call(self, inputs):
            speeds = keras.ops.arange(1, 4, dtype=inputs.dtype)
            return keras.ops.einsum("bi,j->bij", inputs, speeds)

    inputs = keras.Input((None,))
    return keras.Model(inputs, Angles()(inputs))


def _rolling():
    """Rows moved on by one, and back by two."""

    @keras.saving.register_keras_serializable("tests")
    class Rolling(keras.layers.Layer):
        def call(self, inputs):
            square = inputs[:, :, None] * (1 + inputs[:, None])
            return keras.ops.roll(square, (1, -2), axis=(1, 2))

    inputs = keras.Input((None,))
    return keras.Model(inputs, Rolling()(inputs))


def _delta_rules():
    """A layer of Qwen3.5, beside one of RWKV7."""
    from keras_hub.src.models.qwen3_5.qwen3_5_gated_delta_net import (
        Qwen3_5GatedDeltaNet,
    )
    from keras_hub.src.models.rwkv7.rwkv7_layer import RWKV7TimeMix

    class Mixers(keras.layers.Layer):
        def build(self, shape):
            self.net = Qwen3_5GatedDeltaNet(
                hidden_size=8,
                linear_num_key_heads=1,
                linear_num_value_heads=2,
                linear_key_head_dim=4,
                linear_value_head_dim=6,
                linear_conv_kernel_dim=2,
            )
            self.mix = RWKV7TimeMix(8, 4, 3, 3, 3, 3)
            self.net.build(shape)
            self.mix.build(shape)

        def call(self, inputs):
            return self.net(inputs) + self.mix(inputs)[0]

        def compute_output_shape(self, shape):
            return shape

    inputs = keras.Input((None, 8))
    return keras.Model(inputs, Mixers()(inputs))


# The smallest model that fails without each patch.
NEEDS: dict[Any, Any] = {
    delta_rule: _delta_rules,
    erfc: _gelu,
    erfinv: _quantiles,
    fourier: _mixing,
    grouped_convolution: _convolution,
    integer_arithmetic: _distances,
    new_axis: _axes,
    outer_product: _angles,
    recurrence: _recurrent,
    roll: _rolling,
    symbolic_integer: _counting,
    symbolic_repeat: _repeating,
    symbolic_size: _larger,
    take_along_axis: _taking,
}

# The smallest model that becomes longer without each patch.
LENGTHENED: dict[Any, Any] = {
    plain_product: _sequence,
    whole_products: _sequence,
}


# Each has a test of its own: there is no model without it, or it stands
# between two calls of one.
APART = (pixel_attention, short_prompt)


def _patches():
    return patches.PATCHES.get(keras.config.backend(), ())


def _error(model, path, but=()):
    """How far the graph is from the model on another batch; `inf` without."""
    signature = read_signature(model)
    rng = np.random.default_rng(0)

    def batch(rows, length):
        return {
            i.name: rng.normal(
                size=i.sized(
                    {
                        a: rows if a == "batch" else length
                        for a in signature.axes
                    }
                )
            ).astype(i.dtype)
            for i in signature.inputs
        }

    try:
        if path.suffix == ".tflite":
            return _litert_error(model, signature, batch(3, 7), path, but)
        if keras.config.backend() == "torch":
            from keras_peft.export import trace_torch

            trace_torch.trace(model, signature, batch(2, 5), path, but)
        else:
            from keras_peft.export import trace_tensorflow

            trace_tensorflow.trace(model, signature, path, but)
        session = onnxruntime.InferenceSession(path)
        given = batch(3, 7)
        names = [value.name for value in session.get_inputs()]
        flat = dict(zip(names, given.values(), strict=True))
        found = session.run(None, flat)[0]
    except Exception:
        return np.inf
    return _relative(model, signature, given, found)


def _relative(model, signature, given, found):
    wanted = keras.ops.convert_to_numpy(signature.call(model, given))
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def _litert_error(model, signature, given, path, but):
    from keras_peft.export.litert import trace

    trace.trace(model, signature, path, but)
    interpreter = Interpreter(model_path=str(path))
    run = interpreter.get_signature_runner(trace.SIGNATURE)
    values = {f"input_{n}": v for n, v in enumerate(given.values())}
    return _relative(model, signature, given, run(**values)["output_0"])


@pytest.mark.slice
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "patch",
    [patch for patch in _patches() if patch not in (*LENGTHENED, *APART)],
    ids=lambda p: p.__name__,
)
def test_a_patch_is_needed_and_mends(patch, tmp_path):
    model = NEEDS[patch]()
    # A few float32 roundings of values of the same size.
    assert _error(model, tmp_path / "mended.onnx") <= 2.0**-20
    assert _error(model, tmp_path / "plain.onnx", but=(patch,)) > 1e-3, (
        f"{patch.__name__} mends what is mended already: remove it"
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(
    keras.config.backend() != "tensorflow", reason="converts in this process"
)
@pytest.mark.parametrize(
    "patch",
    [
        patch
        for patch in patches.PATCHES["litert"]
        if patch not in (*LENGTHENED, *APART)
    ],
    ids=lambda p: p.__name__,
)
def test_a_patch_is_needed_for_litert_and_mends(patch, tmp_path):
    model = NEEDS[patch]()
    # A few float32 roundings of values of the same size.
    assert _error(model, tmp_path / "mended.tflite") <= 2.0**-20
    assert _error(model, tmp_path / "plain.tflite", but=(patch,)) > 1e-3, (
        f"{patch.__name__} mends what is mended already: remove it"
    )


@pytest.mark.slice
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "patch",
    [patch for patch in _patches() if patch in LENGTHENED],
    ids=lambda p: p.__name__,
)
def test_a_patch_shortens_the_graph(patch, tmp_path):
    model = LENGTHENED[patch]()
    paths = tmp_path / "short.onnx", tmp_path / "long.onnx"
    # A few float32 roundings of values of the same size.
    assert _error(model, paths[0]) <= 2.0**-20
    assert _error(model, paths[1], but=(patch,)) <= 2.0**-20
    short, long = (len(onnx.load(path).graph.node) for path in paths)
    assert short < long


@pytest.mark.skipif(
    keras.config.backend() != "tensorflow", reason="converts in this process"
)
def test_a_plain_product_shortens_a_litert_file(tmp_path):
    model = LENGTHENED[plain_product]()
    paths = tmp_path / "short.tflite", tmp_path / "long.tflite"
    # A few float32 roundings of values of the same size.
    assert _error(model, paths[0]) <= 2.0**-20
    assert _error(model, paths[1], but=(plain_product,)) <= 2.0**-20
    short, long = (
        len(flatbuffer.read(path.read_bytes()).subgraphs[0].operators)
        for path in paths
    )
    assert short < long


def _mended(patch, wanted=True):
    return patch.patched() if wanted else contextlib.nullcontext()


def _array(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def _largest(x):
    return np.abs(keras.ops.convert_to_numpy(x)).max()


def _distance(found, wanted):
    return _largest(found - wanted) / _largest(wanted)


def _attentions_of_qwen():
    """One layer twice, with a window of two tokens and without."""
    from keras_hub.src.models.qwen.qwen_attention import QwenAttention

    layers = [
        QwenAttention(
            num_query_heads=2,
            num_key_value_heads=1,
            use_sliding_window_attention=windowed,
            sliding_window_size=2,
        )
        for windowed in (False, True)
    ]
    for layer in layers:
        layer.build((None, None, 8))
    layers[1].set_weights(layers[0].get_weights())
    return layers


def test_fused_attention_has_no_window_and_no_token_without_keys():
    whole, windowed = _attentions_of_qwen()
    x = _array(2, 6, 8)
    causal = np.tril(np.ones((2, 6, 6), "bool"))
    # As keras-hub computes elsewhere, and on TensorFlow when it is mended.
    mended = keras.config.backend() == "tensorflow"
    with _mended(fused_attention, mended):
        wanted = whole(x, attention_mask=causal)
        found = windowed(x, attention_mask=causal)
        # A few float32 roundings of values of the same size.
        assert _distance(found, wanted) <= 2.0**-20
        assert _largest(whole(x, attention_mask=causal & False)) > 0
    if mended:
        found = windowed(x, attention_mask=causal)
        assert _distance(found, wanted) > 1e-3
        assert _largest(whole(x, attention_mask=causal & False)) == 0


# It slices by a list where torch wants a tuple.
@pytest.mark.filterwarnings("ignore")
def test_keys_are_masked_as_on_torch():
    from keras_hub.src.models.roformer_v2 import roformer_v2_attention

    layer = roformer_v2_attention.RoformerAttention(heads=2, head_size=4)
    x = _array(2, 6, 8)
    layer.build(x.shape)
    mask = np.arange(6) < [[6], [3]]
    other = np.where(mask[..., None], x, 1 - x)
    mended = keras.config.backend() != "torch"

    def change():
        """What padding does to the outputs of text."""
        found, wanted = (
            keras.ops.convert_to_numpy(layer(each, attention_mask=mask))[mask]
            for each in (other, x)
        )
        return _distance(found, wanted)

    with _mended(masked_keys, mended):
        assert change() <= 2.0**-20
    if mended:
        assert change() > 1e-3


def test_a_prompt_of_gemma3n_may_be_shorter_than_its_cache():
    model = ZOO["Gemma3nCausalLM"].build()
    backbone = model.backbone
    heads, size = backbone.num_key_value_heads, backbone.head_dim
    shape = (2, backbone.num_hidden_layers, 2, heads, 8, size)
    tokens = np.array([[5, 9, 2], [7, 7, 1]], "int32")
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}

    def logits():
        cache = keras.ops.zeros(shape)
        return model.call_with_cache(tokens, cache, 0)[0]

    with short_prompt.patched():
        # Rounding of some tens of layers, one after the other.
        assert _distance(logits(), model(inputs)) <= 2.0**-16
    with pytest.raises(Exception, match="(?i)shape|size|broadcast"):
        logits()


def test_positions_come_back_as_they_were_stored(tmp_path):
    def positions(model):
        name = "interpolated_position_embeddings"
        (found,) = (v for v in model.variables if v.path.endswith(name))
        return found

    model = ZOO["DepthAnythingBackbone"].build()
    learned = _array(*positions(model).shape)
    positions(model).assign(learned)
    model.save(tmp_path / "model.keras")

    def stored():
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        return keras.ops.convert_to_numpy(positions(loaded))

    with stored_positions.patched():
        assert np.array_equal(stored(), learned)
    assert _distance(stored(), learned) > 1e-3


def test_a_model_may_attend_to_all_pixels():
    from keras_hub.src.models.mobilenetv5.mobilenetv5_attention import (
        Attention2d,
    )

    def model():
        layer = Attention2d(5, 2, channel_axis=-1, data_format="channels_last")
        inputs = keras.Input((4, 3, 6))
        return keras.Model(inputs, layer(inputs)), layer

    pixels = _array(2, 4, 3, 6)
    with pixel_attention.patched():
        mended, layer = model()
        found = mended(pixels)
    # A few float32 roundings of values of the same size.
    assert _distance(found, layer(pixels)) <= 2.0**-20
    if keras.config.backend() == "tensorflow":
        with pytest.raises(TypeError, match="NoneType"):
            model()
