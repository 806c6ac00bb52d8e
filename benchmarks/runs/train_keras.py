"""Rows of `benchmarks/train_gpu.py` in Keras."""

import contextlib
import time

import keras
import keras_hub
import numpy as np
from runs.alone import device
from runs.kernels import milliseconds_by_kind
from runs.steps import TIMED
from runs.steps import seconds_per_step

import keras_peft
from keras_peft import layer_tree
from keras_peft.training.progress import peak_bytes

PROJECTIONS = (
    "query",
    "key",
    "value",
    "attention_output",
    "feedforward_intermediate_dense",
    "feedforward_gate_dense",
    "feedforward_output_dense",
)


def measure(
    path,
    rows,
    length,
    vocabulary,
    prepare=None,
    processes=1,
    bare=False,
    **settings,
):
    """`{"step": seconds, "first_step": seconds, "peak_gib": ...}`.

    `rows` are those of all GPUs together. `bare` is the compiled step alone,
    on JAX: what of a step is not due to `fit`, and which kernels it takes.
    """
    losses = []

    def train(steps):
        losses.append(run(model, arrays, rows, steps))

    with device(path):
        model = build(vocabulary, prepare, **settings)
        if processes > 1:
            keras_peft.training.data_parallel(model)
        arrays = batches(rows, length, vocabulary)
        run = BareSteps() if bare else fit
        reset_peak()
        start = time.perf_counter()
        train(1)
        first = time.perf_counter() - start
    times = seconds_per_step(path, train)
    peak = peak_bytes() or 0
    found = {}
    if bare:
        with device(path, alone=True):
            found["kernels"] = milliseconds_by_kind(train, 3)
    return dict(
        **found,
        step=min(times),
        steps=times,
        first_step=first,
        peak_gib=peak / 2**30,
        losses=losses,
        trainable=int(sum(np.prod(v.shape) for v in model.trainable_variables)),
    )


def build(
    vocabulary, prepare, rank, lora="ours", method=None, base=None, **shape
):
    """A compiled model; `method` is a name and settings, if not plain LoRA."""
    keras.utils.set_random_seed(0)
    with keras_peft.quantized_base(base) if base else contextlib.nullcontext():
        backbone = llama(vocabulary, **shape)
    if base:
        fill(backbone)
    if lora == "keras":
        backbone.enable_lora(rank, target_layer_names=list(PROJECTIONS))
    model = keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)
    if lora == "ours":
        name, settings = method or ("LoRA", dict(rank=rank))
        adapter = getattr(keras_peft, name)(**settings)
        targets = PROJECTIONS if name == "LoRA" else None
        keras_peft.adapt(model, adapter, targets)
    if prepare is not None:
        keras_peft.training.prepare(model, **prepare)
    model.compile(
        optimizer=keras.optimizers.AdamW(1e-4, weight_decay=0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[],
    )
    return model


def llama(vocabulary, layers, heads, key_heads, hidden, inner, tied=True):
    return keras_hub.models.Llama3Backbone(
        vocabulary_size=vocabulary,
        num_layers=layers,
        num_query_heads=heads,
        num_key_value_heads=key_heads,
        hidden_dim=hidden,
        intermediate_dim=inner,
        rope_max_wavelength=500000.0,
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )


def fill(backbone):
    """Reads random kernels into a base in 4 or 8 bits, as from a file."""
    for _, layer in layer_tree.walk(backbone):
        for kernel in layer_tree.packed_kernels(layer):
            draw = keras.random.normal
            kernel.assign(draw(kernel.shape, stddev=0.02, dtype="bfloat16"))


def batches(rows, length, vocabulary):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocabulary, (TIMED * rows, length)).astype("int32")
    return (
        {"token_ids": tokens, "padding_mask": np.ones_like(tokens)},
        np.roll(tokens, -1, axis=1),
    )


def fit(model, arrays, rows, steps):
    """The loss after some steps."""
    some = keras.tree.map_structure(lambda a: a[: steps * rows], arrays)
    history = keras.Model.fit(
        model, *some, batch_size=rows, shuffle=False, verbose=0
    )
    # Where a program failed, Keras leaves the array, and this raises.
    return float(history.history["loss"][-1])


class BareSteps:
    """The program that `fit` calls, called with arrays on the device."""

    state = None

    def __call__(self, model, arrays, rows, steps):
        import jax

        if self.state is None:
            fit(model, arrays, rows, 1)
            kinds = "trainable", "non_trainable", "optimizer", "metrics"
            self.state = model._get_jax_state(
                **{f"{kind}_variables": True for kind in kinds},
                purge_model_variables=True,
            )
            some = keras.tree.map_structure(lambda a: a[:rows], arrays)
            self.batch = jax.device_put(some)
        batches = iter([self.batch] * steps)
        for _ in range(steps):
            logs, self.state = model.train_function(self.state, batches)
        return float(logs["loss"])


def reset_peak():
    # JAX has no such call: there the peak of compiling is counted as well.
    if keras.config.backend() == "torch":
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
