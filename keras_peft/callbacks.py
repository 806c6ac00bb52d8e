"""Checkpoints of a few megabytes, and runs that survive a kill."""

import json
import random
from pathlib import Path

import keras
import safetensors.numpy

from keras_peft import adapter_io
from keras_peft import adapter_state
from keras_peft import layer_tree
from keras_peft.files import existing_folder
from keras_peft.files import whole_folder
from keras_peft.processes import writes_files

_STATE = "training.safetensors"
_PROGRESS = "training.json"


class AdapterCheckpoint(keras.callbacks.Callback):
    """Saves the adapter and the optimizer's state, and resumes from them.

    A run that was killed goes on where its last checkpoint was, when the same
    script is started again: same weights, same optimizer slots, same states of
    random generators, same order of the data. For that the callback seeds
    Python, NumPy and the backend at every epoch and checkpoint; on TensorFlow,
    which shuffles arrays by the seed at the start of `fit`, call
    `keras.utils.set_random_seed()` before `fit` too. A data set that shuffles
    by itself has to do so by the epoch, or not at all.

    The folder is an adapter folder, which `keras_peft.load_adapter` reads,
    and is replaced as a whole. Of several processes that train a model
    together, the first one writes and all of them resume.

    Args:
        folder: Path of the folder.
        name: Which of the model's adapters.
        save_freq: `"epoch"`, or a number of batches. Batches of the epoch that
            was interrupted are read again up to the checkpoint, but not
            computed.

    Raises:
        ValueError: when training starts, if the model has no such adapter, or
            the folder holds a run with other settings.

    Example:
    >>> checkpoint = keras_peft.AdapterCheckpoint("run/")
    >>> model.fit(x, y, epochs=10, callbacks=[checkpoint])
    """

    def __init__(self, folder, name="default", save_freq="epoch"):
        super().__init__()
        is_count = isinstance(save_freq, int) and save_freq > 0
        if save_freq != "epoch" and not is_count:
            raise ValueError(
                "`save_freq` must be 'epoch' or a positive number of batches. "
                f"Received: save_freq={save_freq!r}"
            )
        self.folder = Path(folder)
        self.name = name
        self.save_freq = save_freq
        self.seed = random.randint(0, 2**30)
        self.epoch = 0
        self.skip = 0
        self.unsaved = 0
        self.interrupted = {}

    def on_train_begin(self, logs=None):
        adapter_state.named(self.model, self.name)
        folder = existing_folder(self.folder)
        if (folder / _PROGRESS).is_file():
            self._resume(folder)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
        self._seed(epoch, 0)
        if self.skip:
            self._assign(self.interrupted)
            self._skip_batches()

    def on_train_batch_end(self, batch, logs=None):
        if self.save_freq == "epoch" or self.skip:
            return
        self.unsaved += self.model.steps_per_execution
        if self.unsaved >= self.save_freq:
            self._save(self.epoch, batch + 1)
            self._seed(self.epoch, batch + 1)

    def on_epoch_end(self, epoch, logs=None):
        self._save(epoch + 1, 0)

    def _seed(self, epoch, batch):
        # A run that resumes here draws from the same state: torch's dropout
        # follows the global generator, which no variable holds.
        seed = self.seed + 1_000_003 * epoch + batch
        keras.utils.set_random_seed(seed % 2**32)

    def _save(self, epoch, batch):
        self.unsaved = 0
        if not writes_files(self.model):
            return
        progress = {"epoch": epoch, "batch": batch, "seed": self.seed}
        state = {
            key: keras.ops.convert_to_numpy(variable)
            for key, variable in self._state().items()
        }
        with whole_folder(self.folder) as staging:
            adapter_io.write_adapter(self.model, staging, self.name)
            (staging / _STATE).write_bytes(safetensors.numpy.save(state))
            (staging / _PROGRESS).write_text(json.dumps(progress))

    def _state(self):
        """What training changes beside the adapter and its head."""
        model = self.model
        generators = filter(layer_tree.is_generator, model.variables)
        groups = {
            "optimizer": model.optimizer.variables,
            "generator": generators,
            "metric": model.metrics_variables,
        }
        return {
            f"{group}.{index}": variable
            for group, variables in groups.items()
            for index, variable in enumerate(variables)
        }

    def _resume(self, folder):
        model = self.model
        trainable = model.peft.adapters[self.name].trainable
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        values = safetensors.numpy.load_file(folder / _STATE)
        shapes = {key: tuple(v.shape) for key, v in self._state().items()}
        if shapes != {key: value.shape for key, value in values.items()}:
            raise ValueError(
                "The checkpoint is of a run with another optimizer or model. "
                "Use another folder, or delete it. "
                f"Received: {str(folder)!r}"
            )
        adapter_io.load_adapter(model, folder, self.name, trainable)
        self._assign(values)
        # Keras resets metrics before an epoch: they are needed again there.
        self.interrupted = values
        progress = json.loads((folder / _PROGRESS).read_text())
        self.seed, self.skip = progress["seed"], progress["batch"]
        layer_tree.start_at_epoch(model, progress["epoch"])

    def _assign(self, values):
        for key, variable in self._state().items():
            variable.assign(values[key])

    def _skip_batches(self):
        """Lets the next batches be read, but not computed."""
        model, batch = self.model, self.skip
        compute = model.train_function

        def read(*arguments):  # (data,), or (state, data) on JAX
            if hasattr(arguments[-1], "__next__"):
                for _ in range(model.steps_per_execution):
                    next(arguments[-1])
            self.skip -= model.steps_per_execution
            if self.skip <= 0:
                self.skip = 0
                model.train_function = compute
                self._seed(self.epoch, batch)
            return {} if len(arguments) == 1 else ({}, arguments[0])

        model.train_function = read
