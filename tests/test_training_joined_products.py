"""Laws of layers that compute what adapters add as a part of their product."""

import keras
import numpy as np
import pytest
from models import loss_on_jax
from table import randomize

import keras_peft
from keras_peft.training.joined_products import can_join
from keras_peft.training.shared_inputs import read_inputs_once

pytestmark = [
    pytest.mark.slice,
    pytest.mark.skipif(
        keras.config.backend() != "jax", reason="is for XLA alone"
    ),
]
TOKENS, INPUTS, OUTPUTS = 200, 64, 192
METHODS = {
    "lora": [keras_peft.LoRA(2)],
    "dropout": [keras_peft.LoRA(2, dropout=0.5)],
    "pissa": [keras_peft.LoRA(2, init="pissa")],
    "two": [keras_peft.LoRA(2), keras_peft.LoRA(3)],
    "dora": [keras_peft.LoRA(2, decompose=True)],
}
# Those whose outputs are no sum of the layer's and of thin products.
OTHERS = {
    "scaled": [keras_peft.LoRA(2, decompose=True), keras_peft.IA3()],
    "bias": [keras_peft.LoRA(2, use_bias=True)],
    "gain": [keras_peft.LoRA(2), keras_peft.IA3()],
    "rotated": [keras_peft.LoRA(2), keras_peft.OFT(2)],
    "kernel": [keras_peft.LoRA(2), keras_peft.SHiRA(2)],
}


def adapted(methods, base=None, bias=True, width=OUTPUTS):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((TOKENS, INPUTS)),
            keras.layers.Dense(width, "tanh", bias, bias_initializer="normal"),
        ]
    )
    for number, method in enumerate(methods):
        keras_peft.adapt(
            model, method, targets=["dense.*"], name=f"a{number}", base=base
        )
        randomize(model, f"a{number}")
        base = None
    keras_peft.set_adapter(model, [f"a{n}" for n in range(len(methods))])
    return model


def inputs():
    rng = np.random.default_rng(0)
    return rng.normal(size=(1, TOKENS, INPUTS)).astype("float32")


def outputs_and_gradients(model, x):
    import jax

    loss, trainable = loss_on_jax(model, x)
    value, gradients = jax.value_and_grad(loss)(trainable)
    by_inputs = jax.grad(lambda x: loss_on_jax(model, x)[0](trainable))(x)
    return [value, by_inputs, *gradients]


def products(model, x, backward=True):
    """The shapes of products, forward and backward."""
    import jax

    loss, trainable = loss_on_jax(model, x)
    program = jax.make_jaxpr(jax.grad(loss) if backward else loss)(trainable)
    return [
        equation.outvars[0].aval.shape
        for equation in _equations(program.jaxpr)
        if equation.primitive.name == "dot_general"
    ]


def wide_products(model, x):
    return [s for s in products(model, x) if s[-1] == OUTPUTS and TOKENS in s]


def _equations(program):
    from jax.extend import core

    for equation in program.eqns:
        yield equation
        for inner in equation.params.values():
            inner = getattr(inner, "jaxpr", inner)
            if isinstance(inner, core.Jaxpr):
                yield from _equations(inner)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("base", [None, "nf4", "int8"])
@pytest.mark.parametrize("method", METHODS)
def test_it_computes_what_was_computed(method, base, bias):
    x = inputs()
    found, expected = (adapted(METHODS[method], base, bias) for _ in range(2))
    expected.set_weights(found.get_weights())
    read_inputs_once(found)
    assert len(wide_products(found, x)) == 1
    # To the rounding of float32 sums of INPUTS or TOKENS products.
    for ours, theirs in zip(
        *(outputs_and_gradients(model, x) for model in (found, expected)),
        strict=True,
    ):
        size = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, atol=2**-24 * TOKENS * size)


def test_no_gradient_of_the_kernel_is_formed():
    model = adapted(METHODS["lora"])
    read_inputs_once(model)
    shapes = products(model, inputs())
    assert shapes
    assert not any(
        sorted(shape)[-2:] == sorted((INPUTS, OUTPUTS)) for shape in shapes
    )


@pytest.mark.parametrize("method", OTHERS)
def test_others_are_left_to_themselves(method):
    x = inputs()
    found, expected = (adapted(OTHERS[method]) for _ in range(2))
    expected.set_weights(found.get_weights())
    before = products(found, x, backward=False), wide_products(found, x)
    read_inputs_once(found)
    after = products(found, x, backward=False), wide_products(found, x)
    # Backward, thin products are written again where gradients are at once.
    assert after == before
    ours, theirs = (outputs_and_gradients(m, x) for m in (found, expected))
    np.testing.assert_array_equal(ours[0], theirs[0])


def test_a_kernel_that_trains_gets_its_gradient():
    x = inputs()
    found, expected = (adapted(METHODS["lora"]) for _ in range(2))
    expected.set_weights(found.get_weights())
    for model in (found, expected):
        model.layers[0]._kernel.trainable = True
        assert len(model.trainable_variables) == 3
    read_inputs_once(found)
    _, _, *ours = outputs_and_gradients(found, x)
    _, _, *theirs = outputs_and_gradients(expected, x)
    for mine, other in zip(ours, theirs, strict=True):
        size = np.abs(other).max()
        assert size > 0
        np.testing.assert_allclose(mine, other, atol=2**-24 * TOKENS * size)


def test_rows_of_several_adapters_do_not_train():
    model = adapted(METHODS["two"])
    read_inputs_once(model)
    with (
        keras_peft.adapter_names(model, ["a0"]),
        pytest.raises(ValueError, match="are for inference"),
    ):
        model(inputs(), training=True)


@pytest.mark.parametrize(
    "tokens, inputs, outputs, joins",
    [
        (8192, 2048, 8192, True),
        (8192, 2048, 2048, False),  # As much is copied as is saved.
        (8192, 8192, 2048, False),
        (512, 2048, 8192, False),  # The kernel is what is large.
    ],
)
def test_it_joins_where_less_is_copied_than_is_saved(
    tokens, inputs, outputs, joins
):
    array = np.broadcast_to(np.float32(0), (tokens, inputs))
    layer = keras.layers.Dense(outputs)
    model = keras.Sequential([keras.Input((inputs,)), layer])
    keras_peft.adapt(model, keras_peft.LoRA(2), targets=["dense.*"])
    assert can_join(layer, list(layer.adapters.values()), array) == joins
