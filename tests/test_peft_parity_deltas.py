"""Layers with changed kernels, as Hugging Face PEFT computes them."""

import keras
import numpy as np
import pytest
from peft_linear import peft_linear

import keras_peft
from keras_peft import layer_tree

INPUTS, OUTPUTS = 24, 18
numpy = keras.ops.convert_to_numpy


def _lokr(w):
    """PEFT's matrices are transposed, and with them their factors swapped."""
    found = {}
    for key in ("lokr_w1", "lokr_w2"):
        if key in w:
            found[key] = w[key].T
        else:
            found[f"{key}_a"] = w[f"{key}_b"].T
            found[f"{key}_b"] = w[f"{key}_a"].T
    return found


# By row: our settings, PEFT's, and the PEFT tensors of our arrays.
ROWS = {
    "loha": (
        lambda: keras_peft.LoHa(rank=3, alpha=5),
        ("LoHaConfig", {"r": 3, "alpha": 5}),
        lambda w: {
            "hada_w1_a": w["loha_b1"].T,
            "hada_w1_b": w["loha_a1"].T,
            "hada_w2_a": w["loha_b2"].T,
            "hada_w2_b": w["loha_a2"].T,
        },
    ),
    "lokr": (
        lambda: keras_peft.LoKr(rank=2, alpha=5),
        ("LoKrConfig", {"r": 2, "alpha": 5}),
        _lokr,
    ),
    "lokr-whole": (
        lambda: keras_peft.LoKr(rank=8),
        ("LoKrConfig", {"r": 8, "alpha": 8}),
        _lokr,
    ),
    "lokr-both": (
        lambda: keras_peft.LoKr(rank=1, decompose_both=True),
        ("LoKrConfig", {"r": 1, "alpha": 1, "decompose_both": True}),
        _lokr,
    ),
    "lokr-factor": (
        lambda: keras_peft.LoKr(rank=2, decompose_factor=6),
        ("LoKrConfig", {"r": 2, "alpha": 2, "decompose_factor": 6}),
        _lokr,
    ),
    "vera": (
        lambda: keras_peft.VeRA(rank=7),
        ("VeraConfig", {"r": 7}),
        lambda w: {
            "vera_lambda_d": w["vera_lambda_d"],
            "vera_lambda_b": w["vera_lambda_b"],
            "vera_A": w["vera_projection_a"].T,
            "vera_B": w["vera_projection_b"].T,
        },
    ),
    "miss": (
        lambda: keras_peft.MiSS(rank=6),
        ("MissConfig", {"r": 6}),
        lambda w: {"miss_block": w["miss_block"]},
    ),
    "miss-short-shard": (
        lambda: keras_peft.MiSS(rank=7),
        ("MissConfig", {"r": 7}),
        lambda w: {"miss_block": w["miss_block"]},
    ),
    "shira": (
        lambda: keras_peft.SHiRA(rank=2),
        ("ShiraConfig", {"r": 2}),
        lambda w: {
            "shira_weight": w["shira_values"],
            "shira_indices": w["shira_indices"].T[::-1],
        },
    ),
    "adalora": (
        lambda: keras_peft.AdaLoRA(rank=4, alpha=6),
        ("AdaLoraConfig", {"init_r": 4, "lora_alpha": 6, "total_step": 9}),
        lambda w: {
            "lora_A": w["adalora_p"].T,
            "lora_E": (w["adalora_e"] * w["adalora_mask"])[:, None],
            "lora_B": w["adalora_q"].T,
        },
    ),
}


def _assign(model, tensors):
    """Gives a PEFT model all of its adapter's tensors."""
    import peft
    import torch

    expected = peft.get_peft_model_state_dict(model)
    state = {}
    for name, array in tensors.items():
        (key,) = [key for key in expected if key.endswith(f".{name}")]
        assert tuple(expected[key].shape) == array.shape
        state[key] = torch.from_numpy(np.ascontiguousarray(array))
    assert state.keys() == expected.keys()
    peft.set_peft_model_state_dict(model, state)


@pytest.mark.filterwarnings("ignore")  # PEFT's own.
@pytest.mark.parametrize(
    "make, peft_settings, tensors_of", ROWS.values(), ids=ROWS
)
def test_one_layer_computes_what_it_does_in_peft(
    make, peft_settings, tensors_of
):
    pytest.importorskip("peft")
    import torch

    rng = np.random.default_rng(0)
    layer = keras.layers.Dense(OUTPUTS)
    layer.build((None, INPUTS))
    for variable in layer.variables:
        variable.assign(rng.normal(size=variable.shape).astype("float32"))
    (adapter,) = make().create_all({"": layer}, "default").values()
    adapter.start()
    for variable in adapter.learned:
        value = rng.normal(scale=0.5, size=variable.shape)
        variable.assign(value.astype("float32"))
    tensors = {key: numpy(v) for key, v in adapter.parameters.items()}
    kernel, bias = numpy(layer.kernel), numpy(layer.bias)
    model = peft_linear(*peft_settings, kernel, bias)
    _assign(model, tensors_of(tensors))
    inputs = rng.normal(size=(5, INPUTS)).astype("float32")
    base = numpy(layer(inputs))
    layer_tree.attach(layer, "default", adapter)
    found = numpy(layer(inputs))
    with torch.no_grad():
        expected = model(torch.from_numpy(inputs)).numpy()
    # Two float32 sums of `INPUTS` products, of sums themselves; and PEFT
    # divides AdaLoRA's scale by the rank plus 1e-5.
    tolerance = 16 * INPUTS * 2.0**-24 * np.abs(expected).max()
    assert np.abs(found - expected).max() <= tolerance
    assert np.abs(found - base).max() > 0.1
