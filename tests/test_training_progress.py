"""Laws of the progress callback."""

import importlib.util
import time

import keras
import numpy as np
import pytest

from keras_peft import training


def small_model():
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)]
    )
    model.layers[0].trainable = False
    model.compile("sgd", "mse")
    return model


def run(progress, **kwargs):
    inputs = np.ones((12, 3), "float32")
    return small_model().fit(
        inputs,
        inputs[:, :1],
        batch_size=2,
        epochs=2,
        callbacks=[progress],
        **kwargs,
    )


@pytest.mark.slice
def test_history_has_speed_time_left_and_share():
    history = run(training.Progress(), verbose=0).history
    assert np.all(np.array(history["steps_per_s"]) > 0)
    # All but a first epoch was left, then nothing.
    assert history["minutes_left"][0] > history["minutes_left"][1] == 0
    # One Dense layer of 3 by 4 is frozen, one of 4 by 1 trains.
    share = 100 * 5 / (16 + 5)
    np.testing.assert_allclose(history["trainable_percent"], share)


@pytest.mark.slice
def test_the_line_of_fit_shows_it(capsys):
    keras.config.enable_interactive_logging()
    run(training.Progress(tokens_per_batch=10), verbose=2)
    line = capsys.readouterr().out
    assert "tokens_per_s: " in line
    assert "minutes_left: " in line


class Clock(keras.callbacks.Callback):
    """Takes a known time for each step."""

    def on_train_batch_begin(self, batch, logs=None):
        time.sleep(0.02)


def test_speed_is_tokens_by_the_clock():
    progress = training.Progress(tokens_per_batch=10)
    start = time.perf_counter()
    inputs = np.ones((12, 3), "float32")
    history = small_model().fit(
        inputs,
        inputs[:, :1],
        batch_size=2,
        callbacks=[Clock(), progress],
        verbose=0,
    )
    taken = time.perf_counter() - start
    (speed,) = history.history["tokens_per_s"]
    # No faster than the sleeps, no slower than the five steps of the whole.
    assert 5 * 10 / taken <= speed <= 10 / 0.02


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_a_count_of_tokens_is_positive(count):
    with pytest.raises(ValueError, match="tokens_per_batch"):
        training.Progress(tokens_per_batch=count)


def test_a_plot_is_drawn_or_refused(tmp_path):
    path = tmp_path / "run.png"
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(ImportError, match="pip install matplotlib"):
            training.Progress(plot=path)
    else:
        run(training.Progress(plot=path), verbose=0)
        assert path.read_bytes().startswith(b"\x89PNG")
