"""How fast a run is, how much memory it takes, and how long it has to go."""

import importlib.util
import math
import time
from pathlib import Path

import keras


class Progress(keras.callbacks.Callback):
    """Adds speed, memory and time left to the progress line of `fit`.

    The line and `History` then have

    - `tokens_per_s` (or `steps_per_s`): of this epoch, without its first step,
      which compiles;
    - `minutes_left`: of this `fit`, validation not counted, once the number of
      steps is known;
    - `peak_gib`: the most device memory so far, where the backend tells;
    - `trainable_percent`: the trainable share of the model's numbers.

    It reads the clock and numbers that Keras has fetched already, and never
    waits for the device itself.

    Args:
        tokens_per_batch: Optional positive integer: batch size times length.
            Without it, steps are counted.
        plot: Optional path of a PNG with loss and speed by step, written when
            training ends. Needs matplotlib.

    Raises:
        ImportError: if `plot` is given and matplotlib is not installed.
        ValueError: if `tokens_per_batch` is no positive integer.

    Example:
    >>> progress = keras_peft.training.Progress(tokens_per_batch=8 * 1024)
    >>> model.fit(inputs, targets, batch_size=8, callbacks=[progress])
    """

    # Keras need not wait for the device before it calls this.
    async_safe = True

    def __init__(self, tokens_per_batch=None, plot=None):
        super().__init__()
        is_count = isinstance(tokens_per_batch, int) and tokens_per_batch > 0
        if tokens_per_batch is not None and not is_count:
            raise ValueError(
                "`tokens_per_batch` must be a positive integer, or None. "
                f"Received: tokens_per_batch={tokens_per_batch!r}"
            )
        if plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise ImportError(
                "`plot` needs matplotlib: `pip install matplotlib`, or leave "
                f"`plot` out. Received: plot={str(plot)!r}"
            )
        self.tokens_per_batch = tokens_per_batch
        self.plot = None if plot is None else Path(plot)
        self.rate_name = "tokens_per_s" if tokens_per_batch else "steps_per_s"

    def on_train_begin(self, logs=None):
        trainable, total = (
            sum(math.prod(v.shape) for v in variables)
            for variables in (
                self.model.trainable_variables,
                self.model.variables,
            )
        )
        self.share = 100.0 * trainable / total
        self.steps_before = 0
        self.steps = 0
        self.curve = []

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
        self.first = None
        self.rate = None
        self.steps_before += self.steps
        self.steps = 0

    def on_train_batch_end(self, batch, logs=None):
        now = time.perf_counter()
        # Threads may be late: a batch that comes after the next is passed by.
        if logs is None or batch < self.steps:
            return
        self.steps = batch + 1
        loss = logs.get("loss")
        if self.first is None:
            self.first = batch, now
        else:
            before, start = self.first
            self.rate = (batch - before) / (now - start)
            self.curve.append(
                (self.steps_before + batch + 1, loss, self._speed)
            )
        logs.update(self._numbers())

    def on_epoch_end(self, epoch, logs=None):
        if logs is not None:
            logs.update(self._numbers())

    def on_train_end(self, logs=None):
        if self.plot is not None:
            _draw(self.curve, self.rate_name, self.plot)

    @property
    def _speed(self):
        return self.rate * (self.tokens_per_batch or 1)

    def _numbers(self):
        numbers = {}
        if self.rate:
            numbers[self.rate_name] = self._speed
            per_epoch = self.params.get("steps")
            if per_epoch:
                epochs = self.params["epochs"] - self.epoch - 1
                steps = per_epoch * (epochs + 1) - self.steps
                numbers["minutes_left"] = steps / self.rate / 60
        peak = peak_bytes()
        if peak is not None:
            numbers["peak_gib"] = peak / 2**30
        return {**numbers, "trainable_percent": self.share}


def peak_bytes() -> int | None:
    """The most memory that was in use on the first device, if it tells."""
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        stats = jax.local_devices()[0].memory_stats() or {}
        return stats.get("peak_bytes_in_use")
    if backend == "torch":
        import torch

        available = torch.cuda.is_available()
        return torch.cuda.max_memory_allocated() if available else None
    import tensorflow as tf

    if not tf.config.list_logical_devices("GPU"):
        return None
    return tf.config.experimental.get_memory_info("GPU:0")["peak"]


def _draw(curve, rate_name, path):
    from matplotlib.figure import Figure

    steps, losses, rates = zip(*curve, strict=True) if curve else ((),) * 3
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    above.plot(steps, losses)
    above.set_ylabel("loss")
    below.plot(steps, rates)
    below.set_ylabel(rate_name)
    below.set_ylim(bottom=0)
    below.set_xlabel("step")
    figure.savefig(path, format="png")
