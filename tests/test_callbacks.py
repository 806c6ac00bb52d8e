"""Runs that are killed and resumed, and Keras' own checkpoints."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from models import build
from models import data
from models import fit
from models import outputs
from models import values

import keras_peft

NAME = "bert-classifier"

# Six epochs of four batches with dropout and shuffling; `kill` is the number
# of batches after which the process ends as by `kill -9`, or 0.
RUN = """
import json, os, signal, sys
sys.path[:0] = [{tests!r}]
import keras, numpy as np, keras_peft
from models import build, data

class Kill(keras.callbacks.Callback):
    seen = 0

    def on_train_batch_end(self, batch, logs=None):
        self.seen += 1
        if self.seen == {kill}:
            os.kill(os.getpid(), signal.SIGKILL)

class Losses(keras.callbacks.Callback):
    found = {{}}

    def on_epoch_end(self, epoch, logs=None):
        self.found[epoch] = logs["loss"]

model = build("functional")
keras_peft.adapt(model, keras_peft.LoRA(2, dropout=0.3))
schedule = keras.optimizers.schedules.PolynomialDecay(0.05, 24)
model.compile(
    keras.optimizers.Adam(schedule),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
)
inputs, targets = data("functional", samples=16)
checkpoint = keras_peft.AdapterCheckpoint({folder!r}, save_freq={freq!r})
model.fit(inputs, targets, batch_size=4, epochs=6, verbose=0,
          callbacks=[checkpoint, Losses(), Kill()])
print(json.dumps(Losses.found))
"""


def run(folder, freq, kill=0):
    code = RUN.format(
        tests=str(Path(__file__).parent),
        folder=str(folder),
        freq=freq,
        kill=kill,
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
    )
    expected = -signal.SIGKILL if kill else 0
    assert done.returncode == expected, done.stderr
    if kill:
        return None
    losses = json.loads(done.stdout.splitlines()[-1])
    return {int(epoch): loss for epoch, loss in losses.items()}


@pytest.mark.slice
@pytest.mark.parametrize(
    "freq, first", [pytest.param("epoch", 2, marks=pytest.mark.slow), (3, 2)]
)
def test_a_run_killed_within_an_epoch_resumes_to_the_same_losses(
    freq, first, tmp_path
):
    whole = run(tmp_path / "whole", freq)
    # In the middle of the third epoch; with a checkpoint every three batches
    # the last one is in its middle, too.
    run(tmp_path / "killed", freq, kill=11 if freq == 3 else 10)
    progress = json.loads((tmp_path / "killed/training.json").read_text())
    assert progress["epoch"] == 2
    assert bool(progress["batch"]) == (freq == 3)
    resumed = run(tmp_path / "killed", freq)
    assert sorted(whole) == list(range(6)) and min(resumed) == first
    for epoch, loss in resumed.items():
        # The same sums on the same machine, compiled another time.
        assert loss == pytest.approx(whole[epoch], rel=1e-5)
    assert whole[5] < whole[0]


@pytest.mark.slice
def test_a_checkpoint_is_an_adapter_folder(tmp_path):
    model = build(NAME)
    keras_peft.adapt(model, keras_peft.LoRA(2))
    checkpoint = keras_peft.AdapterCheckpoint(tmp_path / "run")
    fit(model, NAME, epochs=2, callbacks=[checkpoint])
    other = build(NAME)
    keras_peft.load_adapter(other, tmp_path / "run")
    assert np.array_equal(outputs(other, NAME), outputs(model, NAME))
    kinds = {path.suffix for path in (tmp_path / "run").iterdir()}
    assert kinds == {".json", ".safetensors"}


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    checkpoint = keras_peft.AdapterCheckpoint(tmp_path / "run")
    model = build("functional")
    keras_peft.adapt(model, keras_peft.LoRA(2))
    fit(model, "functional", callbacks=[checkpoint])
    for settings in (dict(rank=3), dict(rank=2, alpha=7)):
        other = build("functional")
        keras_peft.adapt(other, keras_peft.LoRA(**settings))
        with pytest.raises(ValueError, match="Received: "):
            fit(other, "functional", callbacks=[checkpoint])
    with pytest.raises(ValueError, match="has no adapters"):
        fit(build("functional"), "functional", callbacks=[checkpoint])


def moves(model, name):
    """Whether every trainable variable still trains."""
    before = values(model.trainable_variables)
    fit(model, name, epochs=2)
    after = values(model.trainable_variables)
    return all(
        not np.array_equal(before[path], after[path])
        for path in before
        # Softmax ignores what all keys share.
        if "key" not in path
    )


@pytest.mark.slice
def test_model_checkpoints_load_and_go_on_training(tmp_path):
    model = build("functional")
    keras_peft.adapt(model, keras_peft.LoRA(2))
    fit(
        model,
        "functional",
        callbacks=[
            keras.callbacks.ModelCheckpoint(tmp_path / "whole.keras"),
            keras.callbacks.ModelCheckpoint(
                tmp_path / "only.weights.h5", save_weights_only=True
            ),
        ],
    )
    expected = outputs(model, "functional")
    whole = keras.models.load_model(tmp_path / "whole.keras")
    assert np.array_equal(outputs(whole, "functional"), expected)
    inputs, targets = data("functional")
    assert whole.evaluate(inputs, targets, verbose=0) == pytest.approx(
        model.evaluate(inputs, targets, verbose=0), rel=1e-5
    )
    only = build("functional")
    keras_peft.adapt(only, keras_peft.LoRA(2))
    only.load_weights(tmp_path / "only.weights.h5")
    assert np.array_equal(outputs(only, "functional"), expected)
    assert moves(whole, "functional") and moves(only, "functional")


@pytest.mark.slice
def test_backup_and_restore_goes_on_where_it_was(tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def train(folder, *callbacks):
        model = build("functional")
        keras_peft.adapt(model, keras_peft.LoRA(2))
        backup = keras.callbacks.BackupAndRestore(folder)
        return fit(model, "functional", 4, callbacks=[backup, *callbacks])

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", Stop())
    resumed = train(tmp_path / "stopped")
    assert resumed == pytest.approx(whole[2:], rel=1e-5)
