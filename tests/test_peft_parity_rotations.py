"""Changes of one kernel, as Hugging Face PEFT computes them."""

import functools

import keras
import numpy as np
import pytest
from peft_linear import peft_linear

import keras_peft
from keras_peft.methods.boft import butterfly

INPUTS, OUTPUTS = 16, 12
numpy = keras.ops.convert_to_numpy


# By row: our settings, PEFT's, and the PEFT tensors of our arrays.
ROWS = {
    "ia3": (
        lambda: keras_peft.IA3(feedforward=[]),
        ("IA3Config", {"feedforward_modules": []}),
        lambda w: {"ia3_l": w["ia3_scale"][:, None]},
    ),
    "ia3-inputs": (
        lambda: keras_peft.IA3(feedforward=["layer"]),
        ("IA3Config", {"feedforward_modules": ["linear"]}),
        lambda w: {"ia3_l": w["ia3_scale"][None]},
    ),
    "oft": (
        lambda: keras_peft.OFT(block_size=4),
        ("OFTConfig", {"oft_block_size": 4}),
        lambda w: {"oft_R": w["oft_rotation"]},
    ),
    "oft-terms": (
        lambda: keras_peft.OFT(num_blocks=2, terms=7),
        (
            "OFTConfig",
            {"oft_block_size": 0, "r": 2, "num_cayley_neumann_terms": 7},
        ),
        lambda w: {"oft_R": w["oft_rotation"]},
    ),
    "oft-four-terms": (
        lambda: keras_peft.OFT(block_size=4, terms=4),
        ("OFTConfig", {"oft_block_size": 4, "num_cayley_neumann_terms": 4}),
        lambda w: {"oft_R": w["oft_rotation"]},
    ),
    "oft-exact": (
        lambda: keras_peft.OFT(block_size=4, cayley="exact"),
        ("OFTConfig", {"oft_block_size": 4, "use_cayley_neumann": False}),
        lambda w: {"oft_R": w["oft_rotation"]},
    ),
    "oft-shared": (
        lambda: keras_peft.OFT(block_size=4, block_share=True),
        ("OFTConfig", {"oft_block_size": 4, "block_share": True}),
        lambda w: {"oft_R": w["oft_rotation"]},
    ),
    "boft": (
        lambda: keras_peft.BOFT(block_size=4),
        ("BOFTConfig", {"boft_block_size": 4}),
        lambda w: {
            "boft_R": w["boft_rotation"],
            "boft_s": w["boft_scale"][:, None],
        },
    ),
    "hra": (
        lambda: keras_peft.HRA(rank=4),
        ("HRAConfig", {"r": 4}),
        lambda w: {"hra_u": w["hra_vectors"]},
    ),
    **{
        f"road-{variant}": (
            functools.partial(keras_peft.RoAd, variant, group_size=4),
            ("RoadConfig", {"variant": f"road_{variant}", "group_size": 4}),
            lambda w: {key: w[key] for key in ("road_theta", "road_alpha")},
        )
        for variant in (1, 2, 4)
    },
}
AROUND_ONE = ("ia3_scale", "boft_scale", "road_alpha")


def _assign(model, tensors):
    import torch

    found = dict(model.named_parameters())
    for name, array in tensors.items():
        (key,) = [k for k in found if f".{name}.default" in k]
        assert found[key].shape == array.shape
        with torch.no_grad():
            found[key].copy_(torch.from_numpy(array))


# PEFT builds a CUDA extension for BOFT, and warns that there is none here.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "row", [pytest.param(r, id=n) for n, r in ROWS.items()]
)
def test_one_kernel_changes_as_in_peft(row):
    pytest.importorskip("peft")
    import torch

    make, peft_settings, tensors_of = row
    rng = np.random.default_rng(0)
    layer = keras.layers.Dense(OUTPUTS)
    layer.build((None, INPUTS))
    for variable in layer.variables:
        variable.assign(rng.normal(size=variable.shape).astype("float32"))
    kernel, bias = numpy(layer.kernel), numpy(layer.bias)
    adapter = make().create("layer", layer, "default")
    adapter.start()
    weights = {}
    for name, variable in adapter.parameters.items():
        weights[name] = rng.normal(scale=0.3, size=variable.shape)
        weights[name] += name in AROUND_ONE
        weights[name] = weights[name].astype("float32")
        variable.assign(weights[name])

    model = peft_linear(*peft_settings, kernel, bias)
    _assign(model, tensors_of(weights))
    inputs = rng.normal(size=(5, INPUTS)).astype("float32")
    with torch.no_grad():
        expected = model(torch.from_numpy(inputs)).numpy()

    change = adapter.bias_delta(bias)
    merged = kernel + adapter.kernel_delta(kernel)
    found = inputs @ merged + bias + (0.0 if change is None else change)
    # Two float32 computations of sums of `INPUTS` products of rotated rows.
    tolerance = 8 * INPUTS * 2.0**-24 * np.abs(expected).max()
    assert np.abs(found - expected).max() <= tolerance


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_a_butterfly_moves_inputs_as_in_peft(factor):
    boft = pytest.importorskip("peft.tuners.boft.layer")
    inputs, size = 32, 4
    blocks = inputs // size // 2**factor
    order = boft.BOFTLayer.block_butterfly_perm(
        None, inputs, blocks, size // 2, factor
    )
    assert np.array_equal(butterfly(inputs, size, factor), order.numpy())


def test_the_two_forms_of_oft_turn_in_opposite_directions():
    layer = keras.layers.Dense(INPUTS, use_bias=False)
    layer.build((None, INPUTS))
    layer.kernel.assign(np.eye(INPUTS))
    rotations = {}
    for form in ("neumann", "exact"):
        method = keras_peft.OFT(block_size=4, cayley=form, terms=40)
        adapter = method.create("layer", layer, "default")
        adapter.start()
        rng = np.random.default_rng(0)
        shape = adapter.oft_rotation.shape
        adapter.oft_rotation.assign(rng.normal(scale=0.1, size=shape))
        change = adapter.kernel_delta(np.eye(INPUTS, dtype="float32"))
        rotations[form] = np.eye(INPUTS) + change
    # Float32, and a series of which the rest is 0.4 ** 40.
    assert np.abs(rotations["neumann"] - rotations["exact"].T).max() < 1e-6
    product = rotations["neumann"] @ rotations["exact"]
    assert np.abs(product - np.eye(INPUTS)).max() < 1e-6
