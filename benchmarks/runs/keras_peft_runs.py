"""The runs of `benchmarks/methods.py` with keras_peft."""

import sys
import tempfile
import time
from pathlib import Path

import keras
import keras_hub
import numpy as np
from runs.data import BATCH
from runs.data import EPOCHS
from runs.data import EPSILON
from runs.data import load

import keras_peft
from keras_peft import adapter_state
from keras_peft import layer_tree

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

TIMED_STEPS = 30


class Decaying:
    """Mixed into an optimizer: its rate falls from `peak` to zero, linearly.

    `peak` is a variable, so that one compiled step serves every rate.
    """

    steps = None

    def build(self, variables):
        if not self.built:
            self.peak = self.add_variable((), initializer="zeros", name="peak")
        super().build(variables)

    @property
    def learning_rate(self):
        done = keras.ops.cast(self.iterations, "float32") / self.steps
        return self.peak * keras.ops.maximum(1.0 - done, 0.0)


class Runner:
    """Trains one method on one task, over and over from the same start.

    Args:
        task: `"sentiment"` or `"dialogue"`.
        preset: Folder of the pretrained model.
        name: Name of the method in the table.
        kind: Name of its class in `keras_peft`, or `None` for the model as
            it is.
        settings: Arguments of that class.
    """

    available = True

    def __init__(self, task, preset, name, kind, settings):
        self.task, self.preset, self.name = task, preset, name
        self.kind, self.settings = kind, settings
        self.data = load(task, preset)
        self.batch = BATCH[task]
        rows = len(self.data["train"]["tokens"])
        self.steps = EPOCHS[task] * -(-rows // self.batch)
        keras.utils.set_random_seed(0)
        self.model = self._adapted()
        self._compile()
        self.starts = [
            (v, keras.ops.convert_to_numpy(v)) for v in self.model.variables
        ]
        self._compile_steps(rows)

    def run(self, rate, seed):
        self._restart(seed)
        start = time.perf_counter()
        if rate:
            self._fit(rate, *self._arrays("train"), EPOCHS[self.task])
        seconds = time.perf_counter() - start
        return {"score": self._score(), **self._size(), "seconds": seconds}

    def time(self, rate, alone):
        """Milliseconds of a step of `fit`, in the context `alone()`."""
        arrays = self._first(TIMED_STEPS * self.batch)
        times = []

        class Clock(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                self.start = time.perf_counter()

            def on_epoch_end(self, epoch, logs=None):
                times.append(time.perf_counter() - self.start)

        with alone():
            self._fit(rate, *arrays, 3, callbacks=[Clock()])
        return {"step_ms": 1000 * min(times[1:]) / TIMED_STEPS}

    # -- Model ---------------------------------------------------------------

    def _adapted(self):
        model = getattr(self, f"_{self.task}")()
        if self.kind is None:
            return model
        options = {}
        if self.settings.get("init") == "eva":
            inputs = self._arrays("train")[0]
            options["calibration"] = keras.tree.map_structure(
                lambda array: array[:64], inputs
            )
        method = getattr(keras_peft, self.kind)(**self.settings)
        return keras_peft.adapt(model, method, **options)

    def _compile(self):
        kinds = {
            "LoRA+": keras_peft.optimizers.LoRAPlus,
            "LoRA-FA": keras_peft.optimizers.LoRAFA,
        }
        kind = kinds.get(self.name, keras.optimizers.AdamW)
        optimizer = type("Decaying" + kind.__name__, (Decaying, kind), {})(
            weight_decay=0.01, epsilon=EPSILON
        )
        optimizer.steps = self.steps
        self.model.compile(
            optimizer=optimizer,
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        optimizer.build(self.model.trainable_variables)

    def _compile_steps(self, rows):
        """Steps of a whole batch and of the last one, while others train."""
        arrays = self._first(self.batch + rows % self.batch)
        self._fit(0.0, *arrays, 1)

    def _restart(self, seed):
        """The start values of a seed; the first is that of `adapt`."""
        keras.utils.set_random_seed(seed)
        for variable, value in self.starts:
            variable.assign(value)
        for variable in self.model.optimizer.variables:
            variable.assign(keras.ops.zeros(variable.shape, variable.dtype))
        if seed == 0 or self.kind is None:
            return
        if self.settings.get("init") != "eva":
            for leaf in adapter_state.leaves(self.model, "default").values():
                leaf.start()
        head = adapter_state.head_variables(self.model).values()
        for variable in head:
            if len(variable.shape) == 2:
                draw = keras.initializers.GlorotUniform(seed)
                variable.assign(draw(variable.shape))

    def _sentiment(self):
        from finetune_sentiment import build_classifier

        return build_classifier(self.preset)

    def _dialogue(self):
        return keras_hub.models.CausalLM.from_preset(
            self.preset, preprocessor=None, dtype="float32"
        )

    def _arrays(self, split):
        """`(inputs, targets, weights)` for `fit`."""
        data = self.data[split]
        inputs = {
            "token_ids": data["tokens"],
            "padding_mask": data["mask"].astype("int32"),
        }
        if self.task == "sentiment":
            inputs["segment_ids"] = np.zeros_like(data["tokens"])
        return inputs, data["targets"], data["weights"]

    def _first(self, rows):
        """`_arrays("train")`, of some rows."""
        return keras.tree.map_structure(
            lambda array: None if array is None else array[:rows],
            self._arrays("train"),
        )

    def _fit(self, rate, inputs, targets, weights, epochs, callbacks=()):
        if self.name == "AdaLoRA":
            allocator = keras_peft.RankAllocator(target_rank=8, interval=1)
            callbacks = [allocator, *callbacks]
        self.model.optimizer.peak.assign(rate)
        keras.Model.fit(
            self.model,
            inputs,
            targets,
            sample_weight=weights,
            batch_size=self.batch,
            epochs=epochs,
            verbose=0,
            callbacks=list(callbacks),
        )

    # -- Results -------------------------------------------------------------

    def _size(self):
        model = self.model
        parameters = sum(
            int(np.prod(v.shape)) for v in model.trainable_variables
        )
        if self.kind is None:
            return dict(
                parameters=parameters, bytes=4 * parameters, merges=True
            )
        with tempfile.TemporaryDirectory() as folder:
            keras_peft.save_adapter(model, Path(folder) / "adapter")
            tensors = Path(folder) / "adapter" / "adapter.safetensors"
            size = tensors.stat().st_size
        layers = layer_tree.adapted_layers(model)
        return dict(
            parameters=parameters,
            bytes=size,
            merges=all(
                adapter.mergeable
                for _, layer in layers
                for adapter in layer.adapters.values()
            ),
        )

    def _score(self):
        model = self.model
        inputs, targets, weights = self._arrays("test")
        if self.task == "sentiment":
            logits = keras.Model.predict(model, inputs, verbose=0)
            return float((logits.argmax(-1) == targets).mean())
        missing = -len(targets) % self.batch

        def fill(array):
            return np.concatenate([array, np.zeros_like(array[:missing])])

        inputs, targets, weights = keras.tree.map_structure(
            fill, (inputs, targets, weights)
        )
        # Keras divides the sum of each batch by all its tokens.
        found = keras.Model.evaluate(
            model,
            inputs,
            targets,
            sample_weight=weights,
            batch_size=self.batch,
            verbose=0,
            return_dict=True,
        )
        # The penalty of AdaLoRA is part of it, and says nothing of the text.
        loss = found["loss"] - float(sum(model.losses))
        return -loss * targets.size / float(weights.sum())
