"""Laws of training: what is computed, and that everybody computes the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from models import build
from models import fit

import keras_peft
from keras_peft import adapter_state

INPUTS, OUTPUTS, TOKENS, RANK = 37, 41, 6, 3


def wide_model(method):
    """Kernels whose size no activation, adapter or batch shares."""
    inputs = keras.Input((TOKENS, INPUTS))
    hidden = keras.layers.EinsumDense(
        "abc,cde->abde", (TOKENS, 1, OUTPUTS), bias_axes="e"
    )(inputs)
    hidden = keras.layers.Reshape((TOKENS, OUTPUTS))(hidden)
    hidden = keras.layers.Dense(INPUTS, activation="relu")(hidden)
    model = keras.Model(inputs, keras.layers.Dense(OUTPUTS)(hidden))
    keras_peft.adapt(model, method)
    return model, np.ones((2, TOKENS, INPUTS), "float32")


def made_on_jax(model, inputs):
    import jax

    def loss(trainable, other):
        outputs, _ = model.stateless_call(trainable, other, inputs)
        return keras.ops.mean(outputs)

    state = (
        [v.value for v in model.trainable_variables],
        [v.value for v in model.non_trainable_variables],
    )
    jaxpr = jax.make_jaxpr(jax.grad(loss))(*state)

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            yield from (var.aval.size for var in equation.outvars)
            for inner in jax.core.jaxprs_in_params(equation.params):
                yield from walk(inner)

    return list(walk(jaxpr.jaxpr))


def made_on_torch(model, inputs):
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []
    kernels = {v.value.data_ptr() for v in model.variables}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in keras.tree.flatten(result):
                # A view of a kernel is no new one.
                if isinstance(tensor, torch.Tensor) and (
                    tensor.data_ptr() not in kernels
                ):
                    sizes.append(tensor.numel())
            return result

    with Watch():
        keras.ops.mean(model(inputs)).backward()
    return sizes


def made_on_tensorflow(model, inputs):
    import tensorflow as tf

    @tf.function
    def gradients(inputs):
        with tf.GradientTape() as tape:
            loss = keras.ops.mean(model(inputs))
        variables = [v.value for v in model.trainable_variables]
        return tape.gradient(loss, variables)

    # Of what the gradients need: the tape also writes down gradients of the
    # kernels, which a compiled function drops because nobody asks for them.
    graph = gradients.get_concrete_function(tf.constant(inputs)).graph
    waiting, needed = [tensor.op for tensor in graph.outputs], {}
    while waiting:
        operation = waiting.pop()
        if operation.name not in needed:
            needed[operation.name] = operation
            waiting += [tensor.op for tensor in operation.inputs]
    views = ("ReadVariableOp", "Placeholder", "Transpose", "Reshape", "Cast")
    return [
        tensor.shape.num_elements()
        for operation in needed.values()
        if operation.type not in views
        for tensor in operation.outputs
    ]


# Methods whose changes are thin, and the width of their hidden products.
THIN = {
    "lora": (lambda: keras_peft.LoRA(RANK), RANK),
    "loha": (lambda: keras_peft.LoHa(2), 4),
    "lokr": (lambda: keras_peft.LoKr(RANK), RANK),
    "vera": (lambda: keras_peft.VeRA(5), 5),
    "miss": (lambda: keras_peft.MiSS(RANK), RANK),
    "adalora": (lambda: keras_peft.AdaLoRA(RANK), RANK),
    "oft": (lambda: keras_peft.OFT(num_blocks=1), INPUTS),
    "boft": (lambda: keras_peft.BOFT(num_blocks=1), INPUTS),
    "hra": (lambda: keras_peft.HRA(2), 2),
    "bias": (keras_peft.BiasTuning, OUTPUTS),
}


@pytest.mark.slice
@pytest.mark.filterwarnings("ignore:.*jax.core.*:DeprecationWarning")
@pytest.mark.parametrize("make, hidden", THIN.values(), ids=THIN)
def test_no_full_size_delta_and_no_full_size_gradient_is_ever_formed(
    make, hidden
):
    model, inputs = wide_model(make())
    made = {
        "jax": made_on_jax,
        "torch": made_on_torch,
        "tensorflow": made_on_tensorflow,
    }[keras.backend.backend()](model, inputs)
    assert TOKENS * 2 * hidden in made  # The first product was seen.
    assert INPUTS * OUTPUTS not in made


LOSSES = """
import json, sys
sys.path[:0] = [{tests!r}]
from models import build, fit
import keras_peft
model = build({name!r})
keras_peft.adapt(model, keras_peft.LoRA(2))
print(json.dumps(fit(model, {name!r}, epochs=5)))
"""


@pytest.mark.parametrize("name", ["functional", "bert-classifier"])
def test_every_backend_has_the_same_losses(name):
    found = {}
    for backend in ("tensorflow", "jax", "torch"):
        done = subprocess.run(
            [
                *(sys.executable, "-W", "ignore", "-c"),
                LOSSES.format(tests=str(Path(__file__).parent), name=name),
            ],
            env={**os.environ, "KERAS_BACKEND": backend},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found[backend] = json.loads(done.stdout.splitlines()[-1])
    # Ten steps of Adam, which divides by the root of tiny second moments and
    # so turns rounding into at most a few thousandths of the rate.
    for losses in found.values():
        assert losses == pytest.approx(found["jax"], rel=1e-3)
    assert found["jax"][-1] < found["jax"][0]


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """A tiny random BERT in a folder that both libraries load."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        # The only GELU that keras-hub's BERT knows.
        hidden_act="gelu_pytorch_tanh",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.5,
    )
    model = transformers.BertModel(config)
    folder = tmp_path_factory.mktemp("bert")
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("decompose", [False, True], ids=["lora", "dora"])
@pytest.mark.filterwarnings("ignore")  # The peers' own.
def test_losses_are_those_of_hugging_face_peft(hugging_face, decompose):
    import copy

    import keras_hub
    import peft
    import torch

    theirs, folder = copy.deepcopy(hugging_face[0]), hugging_face[1]
    ours = keras_hub.models.BertBackbone.from_preset(str(folder), dropout=0.0)
    method = keras_peft.LoRA(rank=2, alpha=3, decompose=decompose)
    keras_peft.adapt(ours, method, ["query", "value"])
    settings = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        lora_dropout=0.0,
        use_dora=decompose,
        target_modules=["query", "value"],
    )
    theirs = peft.get_peft_model(theirs, settings)
    modules = dict(theirs.named_modules())
    for path, leaf in adapter_state.leaves(ours, "default").items():
        block = path.split(".")[1]
        kind = "query" if "query" in path else "value"
        module = modules[
            f"base_model.model.encoder.layer.{block}.attention.self.{kind}"
        ]
        a = keras.ops.convert_to_numpy(leaf.lora_kernel_a)
        with torch.no_grad():
            module.lora_A["default"].weight.copy_(torch.tensor(a.T))
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 20, (4, 6))
    target = rng.normal(size=(4, 6, 8)).astype("float32")

    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    expected = []
    for _ in range(10):
        optimizer.zero_grad()
        outputs = theirs(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.ones(4, 6, dtype=torch.long),
        ).last_hidden_state
        loss = torch.nn.functional.mse_loss(outputs, torch.tensor(target))
        loss.backward()
        optimizer.step()
        expected.append(float(loss))

    model = keras.Model(ours.input, ours(ours.input)["sequence_output"])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    inputs = {
        "token_ids": tokens,
        "segment_ids": np.zeros_like(tokens),
        "padding_mask": np.ones_like(tokens),
    }
    found = model.fit(
        inputs, target, batch_size=4, epochs=10, shuffle=False, verbose=0
    ).history["loss"]
    # float32 sums of at most 64 terms, ten steps one after another.
    assert found == pytest.approx(expected, rel=10 * 64 * 2.0**-23)
    assert expected[-1] < expected[0]


@pytest.mark.slice
def test_a_hand_written_layer_trains_saves_and_loads(tmp_path):
    inputs = keras.Input((6,), dtype="int32")
    hidden = keras_peft.layers.LoRA(keras.layers.Embedding(9, 5), rank=2)(
        inputs
    )
    dense = keras.layers.Dense(4, activation="relu")
    hidden = keras_peft.layers.LoRA(dense, rank=2, alpha=3, use_bias=True)(
        hidden
    )
    model = keras.Model(inputs, hidden)
    assert len(model.trainable_variables) == 5
    model.compile(keras.optimizers.Adam(0.1), "mse")
    tokens = np.arange(24).reshape(4, 6) % 9
    targets = np.ones((4, 6, 4), "float32")
    losses = model.fit(tokens, targets, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    model.save(tmp_path / "model.keras")
    other = keras.models.load_model(tmp_path / "model.keras")
    expected = model.predict(tokens, verbose=0)
    assert np.array_equal(other.predict(tokens, verbose=0), expected)
    assert len(other.trainable_variables) == 5
    wrapper = other.layers[-1]
    config = type(wrapper).from_config(wrapper.get_config()).get_config()
    assert config == wrapper.get_config()


@pytest.mark.slice
def test_settings_round_trip_through_their_config():
    method = keras_peft.LoRA(
        4, 8, 0.1, "rank_stabilized", "pissa", True, {"query": 2}, {"a": 3}
    )
    restored = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(method)
    )
    assert restored == method and restored != keras_peft.LoRA(4)
    assert json.loads(json.dumps(method.get_config())) == method.get_config()


def test_training_after_a_merge_is_plain_keras():
    model = build("functional")
    keras_peft.adapt(model, keras_peft.LoRA(2))
    fit(model, "functional")
    keras_peft.merge(model)
    assert len(model.trainable_variables) == 4
    losses = fit(model, "functional", epochs=3)
    assert losses[-1] < losses[0]


@pytest.mark.slice
@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16"])
def test_a_small_change_is_not_rounded_into_a_kernel(policy):
    """What is added to the outputs is the change, to 8 bits of its own."""
    rng = np.random.default_rng(0)
    model = keras.Sequential(
        [keras.Input((256,)), keras.layers.Dense(192, dtype=policy)]
    )
    keras_peft.adapt(model, keras_peft.LoRA(rank=8))
    (leaf,) = adapter_state.leaves(model, "default").values()
    kernel = leaf.kernel.read()
    b = rng.normal(size=leaf.lora_kernel_b.shape)
    a = keras.ops.convert_to_numpy(leaf.lora_kernel_a)
    b *= 1e-3 * np.linalg.norm(kernel) / np.linalg.norm(a @ b)
    leaf.lora_kernel_b.assign(b)
    units = keras.ops.eye(256, dtype="bfloat16")
    change = leaf(
        units, keras.ops.matmul(units, keras.ops.cast(kernel, "bfloat16"))
    )
    change = keras.ops.convert_to_numpy(keras.ops.cast(change, "float32"))
    # Three roundings to bfloat16, of 2**-9 at most and half of that on average:
    # A, B and the product. In a sum with the kernel, 0.8 of it would be lost.
    error = np.linalg.norm(change - a @ b) / np.linalg.norm(a @ b)
    assert error < 3 * 2.0**-9
