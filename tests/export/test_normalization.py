import graphs
import numpy as np
import pytest

from keras_peft.export.passes import gelu
from keras_peft.export.passes import normalization
from keras_peft.export.passes import rewriting

LAYER_NORM = """g (float[a, b, 8] x) => (float[a, b, 8] y) {{
    mean = ReduceMean(x, axes)
    centered = Sub(x, mean)
    square = Mul(centered, centered)
    variance = ReduceMean({statistic}, axes)
    stable = Add(variance, epsilon)
    root = Sqrt(stable)
    inverse = Reciprocal(root)
    factor = Mul(inverse, gamma)
    scaled = Mul(x, factor)
    minus = Neg(mean)
    shift = Mul(minus, factor)
    biased = Add(shift, beta)
    y = Add(scaled, biased)
}}"""
RMS_NORM = """g (float[a, b, 8] x) => (float[a, b, 8] y) {
    square = Pow(x, two)
    mean = ReduceMean(square, axes)
    stable = Add(mean, epsilon)
    root = Sqrt(stable)
    inverse = Reciprocal(root)
    scaled = Mul(x, inverse)
    y = Mul(scaled, gamma)
}"""
# 8 terms are summed twice, in another order.
TOLERANCE = 32 * 2**-23


def layer_norm(statistic="square", last=-1):
    return graphs.graph(
        LAYER_NORM.format(statistic=statistic),
        axes=np.array([last]),
        epsilon=np.float32(1e-3),
        gamma=graphs.random(1, 1, 8, seed=1),
        beta=graphs.random(1, 1, 8, seed=2),
    )


def rms_norm(last=-1):
    return graphs.graph(
        RMS_NORM,
        two=np.float32(2),
        axes=np.array([last]),
        epsilon=np.float32(1e-3),
        gamma=graphs.random(8, seed=1),
    )


def test_a_spelled_out_layer_norm_becomes_one_operator():
    model = layer_norm()
    x = graphs.random(2, 3, 8)
    want = graphs.run(model, x=x)
    assert normalization.apply(model) == 1
    assert "LayerNormalization" in graphs.ops(model)
    assert model.graph.outputs[0].producer().op_type == "LayerNormalization"
    np.testing.assert_allclose(
        graphs.run(model, x=x), want, atol=TOLERANCE * np.abs(want).max()
    )


@pytest.mark.parametrize("change", [{"statistic": "x"}, {"last": 1}])
def test_another_statistic_is_left_alone(change):
    model = layer_norm(**change)
    assert normalization.apply(model) == 0


def test_an_rms_norm_divides_so_that_the_runtime_fuses_it():
    model = rms_norm()
    x = graphs.random(2, 3, 8)
    want = graphs.run(model, x=x)
    assert normalization.apply(model) == 1
    np.testing.assert_allclose(
        graphs.run(model, x=x), want, atol=TOLERANCE * np.abs(want).max()
    )
    rewriting.drop_unused(model)
    assert graphs.fused_ops(model) == {"SimplifiedLayerNormalization": 1}


def test_a_root_mean_square_of_another_axis_is_left_alone():
    assert normalization.apply(rms_norm(last=1)) == 0


ERF = """g (float[a, b] x) => (float[a, b] y) {
    half = Mul(point_five, x)
    minus = Neg(x)
    scaled = Mul(minus, root)
    erf = Erf(scaled)
    gate = Sub(one, erf)
    y = Mul(half, gate)
}"""
TANH = """g (float[a, b] x) => (float[a, b] y) {
    half = Mul(point_five, x)
    cube = Pow(x, three)
    term = Mul(factor, cube)
    inner = Add(x, term)
    scaled = Mul(root, inner)
    tanh = Tanh(scaled)
    gate = Add(one, tanh)
    y = Mul(half, gate)
}"""


def formula(text, root, **more):
    numbers = {"point_five": 0.5, "one": 1.0, "root": root, **more}
    return graphs.graph(text, **{k: np.float32(v) for k, v in numbers.items()})


@pytest.mark.parametrize(
    ("text", "numbers", "form"),
    [
        (ERF, {"root": 0.5**0.5}, "none"),
        (
            TANH,
            {"root": (2 / np.pi) ** 0.5, "three": 3, "factor": 0.044715},
            "tanh",
        ),
    ],
)
def test_both_formulas_of_gelu_become_one_operator(text, numbers, form):
    model = formula(text, **numbers)
    model.opset_imports[""] = model.graph.opset_imports[""] = 18
    x = 3 * graphs.random(20, 30)
    want = graphs.run(model, x=x)
    assert gelu.apply(model) == 1
    (node,) = [n for n in model.graph if n.op_type == "Gelu"]
    assert node.attributes["approximate"].as_string() == form
    assert model.opset_imports[""] == 20
    # Ten operators, each rounded once, of values that approximations of the
    # error function and of tanh know to 2**-21.
    np.testing.assert_allclose(
        graphs.run(model, x=x), want, atol=2**-19 * np.abs(x).max()
    )


def test_a_formula_with_another_constant_is_left_alone():
    model = formula(ERF, root=0.7)
    assert gelu.apply(model) == 0
    assert "Gelu" not in graphs.ops(model)
