import keras
import model_table
import numpy as np
import onnxruntime
import pytest

from keras_peft.export.build import build_onnx
from keras_peft.export.graph import TracingError


def run(proto, batch):
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, batch)


def check_every_promise(model):
    """What must hold for an export of any model."""
    result = build_onnx(model, quantize="int8")
    exact, small = result.verification
    assert exact.step == "float32"
    # The bound counts roundings (comparison.rounding_bound).
    assert exact.relative <= exact.tolerance < 1e-3
    # 8 bits: a wrong graph of random weights has a cosine near 0.
    assert small.cosine > 0.95
    assert len(exact.shapes) >= 2
    assert exact.shapes[0] != exact.shapes[1]
    assert result.sizes["int8"] == result.model.ByteSize()
    names = [
        name
        for proto in (result.model, result.float_model)
        for value in (*proto.graph.input, *proto.graph.output)
        for name in [value.name]
        + [d.dim_param for d in value.type.tensor_type.shape.dim]
    ]
    assert not any(name.startswith(("unk__", "keras_tensor")) for name in names)
    return result


@pytest.mark.parametrize("name", model_table.QUICK)
def test_exported_graph_equals_the_model_on_other_shapes(name):
    check_every_promise(model_table.make(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", model_table.SLOW)
def test_exported_graph_of_every_kind_equals_the_model(name):
    check_every_promise(model_table.make(name))


@pytest.mark.slow
def test_a_model_with_unusual_inputs_is_exported_on_real_ones():
    rng = np.random.default_rng(0)

    def prompts(batch, points, boxes):
        shapes = {
            "images": (batch, 64, 64, 3),
            "points": (batch, points, 2),
            "labels": (batch, points),
            "boxes": (batch, boxes, 2, 2),
            "masks": (batch, 2, 16, 16, 1),
        }
        made = {k: rng.uniform(0, 8, s) for k, s in shapes.items()}
        made["labels"] = made["labels"] // 4
        return {k: v.astype("float32") for k, v in made.items()}

    result = build_onnx(
        model_table.make("sam"),
        calibration=[prompts(2, 3, 4), prompts(3, 5, 2), prompts(1, 2, 3)],
    )
    assert result.verification[0].relative <= result.verification[0].tolerance


@pytest.fixture(scope="module")
def small():
    inputs = keras.Input((6,), name="features")
    outputs = keras.layers.Dense(3, name="scores")(inputs)
    model = keras.Model(inputs, outputs)
    return model, build_onnx(model, quantize="float16")


def test_inputs_and_outputs_carry_the_names_of_the_model(small):
    _, result = small
    assert [i.name for i in result.inputs] == ["features"]
    assert [i.shape for i in result.inputs] == [("batch", 6)]
    assert [o.name for o in result.outputs] == ["scores"]
    assert [o.shape for o in result.outputs] == [("batch", 3)]
    assert [o.dtype for o in result.outputs] == ["float32"]


def test_weights_carry_the_paths_of_their_variables(small):
    model, result = small
    names = {i.name for i in result.float_model.graph.initializer}
    assert {variable.path for variable in model.variables} <= names


def test_float16_keeps_float32_inputs_and_outputs(small):
    model, result = small
    x = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    got = run(result.model, {"features": x})[0]
    assert got.dtype == np.float32
    want = keras.ops.convert_to_numpy(model(x))
    # 6 products and a bias, each rounded to 11 bits.
    bound = 8 * 2**-11 * np.abs(want).max() * 2
    np.testing.assert_allclose(got, want, atol=bound)


def test_a_tolerance_that_int8_misses_discards_the_file(small):
    model, _ = small
    with pytest.raises(ValueError, match="more than the tolerance"):
        build_onnx(model, quantize="int8", tolerance=1e-9)


def test_a_tracer_that_fails_is_named_beside_the_one_that_worked():
    model = model_table.with_layer(model_table.NotTraceableByTorch())
    result = build_onnx(model)
    assert result.tracer == "tensorflow"
    (note,) = result.notes
    assert "torch tracer failed" in note
    assert "this layer is opaque to torch" in note


def test_a_graph_that_computes_something_else_is_never_returned():
    model = model_table.with_layer(model_table.OwnToTheProcess())
    with pytest.raises(TracingError, match="differs from the model"):
        build_onnx(model)
