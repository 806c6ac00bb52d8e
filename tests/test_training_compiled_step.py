"""Laws of how JAX compiles a step."""

import re

import keras
import pytest
from models import build
from models import fit
from models import summary_of

import keras_peft
from keras_peft import training
from keras_peft.training import compiled_step

pytestmark = [
    pytest.mark.slice,
    pytest.mark.skipif(
        keras.config.backend() != "jax", reason="is about XLA's options"
    ),
]


@pytest.fixture
def as_on_gpu(monkeypatch):
    """A processor takes the options all the same, and has no such kernels."""
    monkeypatch.setattr(compiled_step, "is_on_gpu", lambda: True)


def adapted(**settings):
    model = build("llama")
    keras_peft.adapt(model, keras_peft.LoRA(rank=2, **settings))
    compiled_step.compile_step(model)
    return model


def compiled_into(folder, monkeypatch):
    """Lets XLA write what it makes of steps into a folder."""
    monkeypatch.setattr(compiled_step, "_OPTIONS", {"xla_dump_to": str(folder)})


def steps_in(folder):
    return list(folder.glob("*jit_state_first*after_optimizations.txt"))


def test_training_is_the_same(as_on_gpu):
    plain = build("llama")
    keras_peft.adapt(plain, keras_peft.LoRA(rank=2))
    expected = fit(plain, "llama")
    model = adapted()
    # Both from the seed that `build` sets: the same program, to the bit.
    assert fit(model, "llama") == expected
    training.restore(model)
    fit(model, "llama")


def test_state_stays_in_its_place(as_on_gpu, monkeypatch, tmp_path):
    """Every array of the state is returned in the memory it came in."""
    compiled_into(tmp_path, monkeypatch)
    model = adapted()
    fit(model, "llama")
    (step,) = steps_in(tmp_path)
    header = step.read_text().splitlines()[0]
    pairs = re.findall(r"\{(\d+)\}: \((\d+), ", header)
    state = [
        *model.trainable_variables,
        *model.non_trainable_variables,
        *model.optimizer.variables,
        *model.metrics_variables,
    ]
    expected = {str(i) for i in range(len(state))}
    assert {out for out, argument in pairs if out == argument} == expected


@pytest.mark.parametrize("decompose", [False, True])
def test_the_compiler_is_told(decompose, as_on_gpu, monkeypatch, tmp_path):
    compiled_into(tmp_path, monkeypatch)
    fit(adapted(decompose=decompose), "llama")
    assert steps_in(tmp_path)


def test_an_unknown_option_is_left_out(as_on_gpu, monkeypatch):
    assert "cuBLAS" in summary_of(adapted())
    monkeypatch.setattr(compiled_step, "_OPTIONS", {"no_such_option": True})
    model = adapted()
    assert "cuBLAS" not in summary_of(model)
    fit(model, "llama")


def test_a_processor_is_told_nothing():
    assert "cuBLAS" not in summary_of(adapted())
