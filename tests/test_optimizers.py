"""Laws of the optimizers that tell LoRA's two factors apart."""

import keras
import numpy as np
import pytest
from models import build
from models import data
from models import same_bits
from models import values
from table import randomize

import keras_peft
from keras_peft import adapter_state
from keras_peft.optimizers import LoRAFA
from keras_peft.optimizers import LoRAPlus

pytestmark = pytest.mark.slice
numpy = keras.ops.convert_to_numpy
STEPS, RATE = 6, 0.01
# 1 - 0.999 in float32 is known to 2**-24 / 0.001 of itself, and every step of
# Adam divides by its root.
ADAM = STEPS * 2.0**-24 / 0.001


def adapted():
    """An embedding, two dense layers and a head, with an alpha."""
    inputs = keras.Input((6,), dtype="int32")
    hidden = keras.layers.Embedding(9, 5)(inputs)
    hidden = keras.layers.Flatten()(keras.layers.Dense(7)(hidden))
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(hidden))
    method = keras_peft.LoRA(2, alpha=3)
    targets = ["embeddings", "dense"]
    keras_peft.adapt(model, method, targets, head="head")
    randomize(model, scale=0.1)
    return model


def factors(model):
    """`{"fixed" or "moving" kind: variables}`: on embeddings A moves."""
    found: dict = {"fixed": [], "moving": []}
    for path, leaf in adapter_state.leaves(model, "default").items():
        pair = [leaf.lora_kernel_a, leaf.lora_kernel_b]
        if "embedding" in path:
            pair.reverse()
        found["fixed"].append(pair[0])
        found["moving"].append(pair[1])
    assert len(found["moving"]) == 2
    return found


class Adam:
    """AdamW of one variable in float64, as its papers have it."""

    def __init__(self, value, decay=0.0):
        self.value, self.decay = value.astype("float64"), decay
        self.mean = self.square = self.count = 0

    def step(self, gradient, rate):
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient**2
        mean = self.mean / (1 - 0.9**self.count)
        square = self.square / (1 - 0.999**self.count)
        self.value = self.value * (1 - rate * self.decay)
        self.value = self.value - rate * mean / np.sqrt(square)


def apply(model, optimizer, gradients):
    optimizer.apply(
        [keras.ops.convert_to_tensor(g) for g in gradients],
        model.trainable_variables,
    )


def random_gradients(model, rng):
    shapes = [variable.shape for variable in model.trainable_variables]
    return [rng.normal(size=shape).astype("float32") for shape in shapes]


def schedule():
    return keras.optimizers.schedules.PiecewiseConstantDecay(
        [2], [RATE, RATE / 4]
    )


@pytest.mark.parametrize("scheduled", [False, True])
def test_lora_plus_gives_the_zero_factor_the_higher_rate(scheduled):
    model, rng = adapted(), np.random.default_rng(0)
    optimizer = LoRAPlus(
        schedule() if scheduled else RATE, ratio=4, weight_decay=0.1
    )
    faster = {id(variable) for variable in factors(model)["moving"]}
    variables = model.trainable_variables
    expected = [Adam(numpy(variable), decay=0.1) for variable in variables]
    for step in range(STEPS):
        gradients = random_gradients(model, rng)
        apply(model, optimizer, gradients)
        rate = RATE / 4 if scheduled and step > 2 else RATE
        for adam, variable, gradient in zip(
            expected, variables, gradients, strict=True
        ):
            adam.step(gradient, rate * (4 if id(variable) in faster else 1))
    for adam, variable in zip(expected, variables, strict=True):
        error = np.abs(numpy(variable) - adam.value).max()
        assert error <= 4 * RATE * ADAM * 10  # Steps of up to ten rates.


def test_lora_fa_moves_one_factor_as_the_full_kernel_would_move():
    """The change of `scale * A @ B` is the full gradient's, projected."""
    model, rng, scale = adapted(), np.random.default_rng(0), 3 / 2
    optimizer = LoRAFA(RATE, weight_decay=0.1)
    variables = model.trainable_variables
    found = factors(model)
    start = values(found["fixed"])
    expected = {}
    for variable in variables:
        if all(variable is not fixed for fixed in found["fixed"]):
            expected[id(variable)] = Adam(numpy(variable), decay=0.1)
    pairs = list(zip(found["fixed"], found["moving"], strict=True))
    for _ in range(STEPS):
        gradients = dict(
            zip(map(id, variables), random_gradients(model, rng), strict=True)
        )
        for fixed, moving in pairs:
            fixed_value, gives_a = numpy(fixed), fixed.shape[0] == 2
            factor = fixed_value.T if gives_a else fixed_value
            other = moving.shape[0] if gives_a else moving.shape[1]
            full = rng.normal(size=(factor.shape[0], other))
            gradient = scale * factor.T @ full
            gradients[id(moving)] = gradient.T if gives_a else gradient
            # Least squares: scale * factor @ move is nearest to `full`.
            move = np.linalg.lstsq(factor, full, rcond=None)[0] / scale
            expected[id(moving)].step(move.T if gives_a else move, RATE)
        apply(
            model,
            optimizer,
            [gradients[id(v)].astype("float32") for v in variables],
        )
        moved = {id(moving) for moving in found["moving"]}
        for key in expected.keys() - moved:
            expected[key].step(gradients[key], RATE)
    assert same_bits(start, values(found["fixed"]))
    for variable in variables:
        if id(variable) in expected:
            error = np.abs(numpy(variable) - expected[id(variable)].value)
            # Least squares of five to seven equations in float32.
            assert error.max() <= 10 * RATE * ADAM * 10


def compiled(optimizer, name="functional"):
    model = build(name)
    keras_peft.adapt(model, keras_peft.LoRA(2, alpha=4))
    loss = keras.losses.SparseCategoricalCrossentropy(True)
    model.compile(optimizer, loss)
    return model


def fit(model, name="functional", epochs=3):
    return keras.Model.fit(
        model,
        *data(name),
        epochs=epochs,
        batch_size=4,
        shuffle=False,
        verbose=0,
    ).history["loss"]


def kernels(model, letter):
    leaves = adapter_state.leaves(model, "default").values()
    return values([getattr(leaf, f"lora_kernel_{letter}") for leaf in leaves])


def test_a_ratio_of_one_is_adamw():
    found = {}
    for optimizer in (
        keras.optimizers.AdamW(RATE, weight_decay=0.1),
        LoRAPlus(RATE, ratio=1, weight_decay=0.1),
        LoRAPlus(RATE, ratio=16, weight_decay=0.1),
    ):
        found[optimizer] = fit(compiled(optimizer))
    same, plain, faster = found.values()
    assert same == pytest.approx(plain, rel=1e-5)
    assert faster[-1] < plain[-1]


def test_lora_fa_trains_b_and_the_head_alone():
    name = "bert-classifier"
    optimizer = LoRAFA(RATE, weight_decay=0.1, global_clipnorm=0.1)
    model = compiled(optimizer, name)
    before = {letter: kernels(model, letter) for letter in "ab"}
    head = values(adapter_state.head_variables(model).values())
    losses = fit(model, name)
    assert losses[-1] < losses[0]
    assert same_bits(before["a"], kernels(model, "a"))
    for path, value in kernels(model, "b").items():
        assert not np.array_equal(value, before["b"][path])
    assert not same_bits(
        head, values(adapter_state.head_variables(model).values())
    )


MAKERS = {
    "plus": lambda **options: LoRAPlus(RATE, weight_decay=0.1, **options),
    "fa": lambda **options: LoRAFA(RATE, weight_decay=0.1, **options),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_training_goes_on_from_a_file(make, tmp_path):
    losses = fit(compiled(make()), epochs=4)
    model = compiled(make())
    fit(model, epochs=2)
    model.save(tmp_path / "model.keras")
    restored = keras.models.load_model(tmp_path / "model.keras")
    assert type(restored.optimizer) is type(make())
    # Adam divides by the roots of tiny numbers: rounding grows.
    assert fit(restored, epochs=2) == pytest.approx(losses[2:], rel=1e-4)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_scaling_the_loss_changes_nothing(make):
    expected = fit(compiled(make()))
    scaled = keras.optimizers.LossScaleOptimizer(make(), initial_scale=1024.0)
    # Powers of two scale without rounding.
    assert fit(compiled(scaled)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_accumulated_gradients_are_those_of_the_larger_batch(make):
    whole, halves = (
        compiled(make()),
        compiled(make(gradient_accumulation_steps=2)),
    )
    inputs, targets = data("functional")
    for model, size in ((whole, 8), (halves, 4)):
        keras.Model.fit(
            model, inputs, targets, batch_size=size, shuffle=False, verbose=0
        )
    for letter in "ab":
        for a, b in zip(
            kernels(whole, letter).values(),
            kernels(halves, letter).values(),
            strict=True,
        ):
            # One step of Adam is as long as the rate, up to sixteen rates
            # here; gradients near 1e-7, its epsilon, are rounded most.
            assert np.abs(a - b).max() <= 16 * RATE * 1e-2


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_settings_round_trip(make):
    optimizer = make(beta_1=0.8, clipnorm=1.0)
    config = keras.optimizers.serialize(optimizer)
    restored = keras.optimizers.deserialize(config)
    assert type(restored) is type(optimizer)
    assert restored.get_config() == optimizer.get_config()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_model_without_lora_is_refused(make):
    model = build("functional")
    model.compile(make(), "mse")
    with pytest.raises(ValueError, match="trains the two factors of LoRA"):
        model.optimizer.build(model.trainable_variables)


@pytest.mark.parametrize("ratio", [0.5, -16, float("nan")])
def test_a_ratio_below_one_is_refused(ratio):
    with pytest.raises(ValueError, match="at least 1.*Received: ratio="):
        LoRAPlus(ratio=ratio)


# -- The peer ----------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.filterwarnings("ignore")  # The peer's own.
def test_weights_become_those_of_hugging_face_peft(kind, monkeypatch):
    import peft
    import torch
    from peft.optimizers import lorafa

    # Else it rounds gradients to bfloat16.
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 6)).astype("float32")
    y = rng.normal(size=(16, 4)).astype("float32")
    ours = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4)])
    keras_peft.adapt(ours, keras_peft.LoRA(2, alpha=5))
    (leaf,) = adapter_state.leaves(ours, "default").values()
    module = torch.nn.Sequential()
    module.add_module("linear", torch.nn.Linear(6, 4))
    with torch.no_grad():
        kernel = numpy(leaf.kernel.variable).T
        module.linear.weight.copy_(torch.tensor(kernel))
        module.linear.bias.zero_()
    settings = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["linear"])
    theirs = peft.get_peft_model(module, settings)
    layer = theirs.base_model.model.linear
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        a.copy_(torch.tensor(numpy(leaf.lora_kernel_a).T))
    if kind == "plus":
        theirs_optimizer = peft.optimizers.create_loraplus_optimizer(
            theirs,
            torch.optim.AdamW,
            lr=RATE,
            loraplus_lr_ratio=16,
            loraplus_weight_decay=0.1,
            eps=1e-12,
        )
        optimizer = LoRAPlus(RATE, ratio=16, weight_decay=0.1, epsilon=1e-12)
    else:
        theirs_optimizer = peft.optimizers.create_lorafa_optimizer(
            theirs, r=2, lora_alpha=5, lr=RATE
        )
        optimizer = LoRAFA(RATE, epsilon=1e-6)
    for _ in range(STEPS):
        theirs_optimizer.zero_grad()
        outputs = theirs(torch.tensor(x))
        torch.nn.functional.mse_loss(outputs, torch.tensor(y)).backward()
        theirs_optimizer.step()
    ours.compile(optimizer, "mse")
    ours.fit(x, y, batch_size=16, epochs=STEPS, shuffle=False, verbose=0)
    largest = (16 if kind == "plus" else 1) * RATE * STEPS
    for variable, weight in ((leaf.lora_kernel_a, a), (leaf.lora_kernel_b, b)):
        error = np.abs(numpy(variable).T - weight.detach().numpy()).max()
        assert error <= largest * ADAM * 10
    assert np.abs(numpy(leaf.lora_kernel_b)).max() > largest / 10
