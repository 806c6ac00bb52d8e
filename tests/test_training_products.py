"""Laws of how the products of a step are compiled for a GPU."""

import keras
import pytest
from models import build
from models import fit
from models import summary_of

import keras_peft
from keras_peft import training
from keras_peft.training import products

pytestmark = [
    pytest.mark.slice,
    pytest.mark.skipif(
        keras.config.backend() != "jax", reason="is about XLA's options"
    ),
]


def adapted(**settings):
    model = build("llama")
    keras_peft.adapt(model, keras_peft.LoRA(rank=2, **settings))
    products.add_in_products(model)
    return model


def test_training_is_the_same():
    """A processor has no such kernels, and takes the option all the same."""
    plain = build("llama")
    keras_peft.adapt(plain, keras_peft.LoRA(rank=2))
    expected = fit(plain, "llama")
    model = adapted()
    # Both from the seed that `build` sets: the same program, to the bit.
    assert fit(model, "llama") == expected
    training.restore(model)
    fit(model, "llama")


@pytest.mark.parametrize("decompose", [False, True])
def test_the_compiler_is_told_but_for_dora(decompose, monkeypatch, tmp_path):
    monkeypatch.setattr(products, "_OPTIONS", {"xla_dump_to": str(tmp_path)})
    fit(adapted(decompose=decompose), "llama")
    steps = {path for path in tmp_path.iterdir() if "step" in path.name}
    assert bool(steps) != decompose


def test_an_unknown_option_is_left_out(monkeypatch):
    assert "cuBLAS" in summary_of(adapted())
    monkeypatch.setattr(products, "_OPTIONS", {"no_such_option": True})
    model = adapted()
    assert "cuBLAS" not in summary_of(model)
    fit(model, "llama")
