"""Quantization-aware training for `benchmarks/quantize_llm.py`."""

import json
import time
from pathlib import Path

import keras
import keras_hub
import numpy as np

import keras_peft

# As the float adapters were trained: rows of a batch, rate, epochs.
RECIPES = {"dialogue": (16, 1e-4, 1), "novel": (8, 2e-4, 2)}
# What rounding loses has no few directions: rank 8 makes up for less of it.
RANK = 32
# The norms' epsilon, which keras-hub does not read from the preset.
EPSILON = 1e-5


def base(preset):
    """The model as its authors meant it."""
    model = keras_hub.models.CausalLM.from_preset(
        str(preset), preprocessor=None, dtype="float32"
    )
    for layer in model.backbone._flatten_layers():
        if hasattr(layer, "epsilon") and "norm" in layer.name:
            layer.epsilon = EPSILON
    return model


def merged(preset, adapter):
    """The fine-tuned model, in float32."""
    model = base(preset)
    keras_peft.load_adapter(model, adapter)
    keras_peft.merge(model)
    return model


def train(
    task, arrays, preset, adapter, output, quantize_aware, epochs=None, seed=0
):
    """Goes on training a merged model, with or without its integers.

    Returns `{when: mean loss of the test part}` and the seconds it took.
    """
    model = merged(preset, adapter)
    rows, rate, usual = RECIPES[task]
    epochs = epochs or usual
    found = {"merged": loss_of(model, arrays["test"])}
    calibration = arrays["calibration"]
    keras.utils.set_random_seed(seed)
    start = time.perf_counter()
    options = {}
    if quantize_aware:
        batches = [inputs_of(calibration[i : i + 4]) for i in range(0, 24, 4)]
        options = dict(quantize_aware=quantize_aware, calibration=batches)
    keras_peft.adapt(model, keras_peft.LoRA(rank=RANK), **options)
    found["start"] = loss_of(model, arrays["test"])
    data = arrays["train"]
    steps = epochs * -(-len(data["tokens"]) // rows)
    schedule = keras.optimizers.schedules.PolynomialDecay(rate, steps, 0.0)
    model.compile(
        keras.optimizers.AdamW(schedule, weight_decay=0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    keras.Model.fit(
        model,
        inputs_of(data["tokens"], data["mask"]),
        data["targets"],
        sample_weight=data["weights"],
        batch_size=rows,
        epochs=epochs,
        verbose=0,
    )
    found["trained"] = loss_of(model, arrays["test"])
    found["seconds"] = time.perf_counter() - start
    keras_peft.save_adapter(model, output)
    Path(output, "losses.json").write_text(json.dumps(found))
    return found


def inputs_of(tokens, mask=None):
    mask = np.ones(tokens.shape) if mask is None else mask
    return {"token_ids": tokens, "padding_mask": mask.astype("int32")}


def loss_of(model, part, rows=8):
    """Mean loss per token that counts."""
    total = 0.0
    tokens, mask = part["tokens"], part["mask"]
    for i in range(0, len(tokens), rows):
        some = slice(i, i + rows)
        logits = model.predict_on_batch(inputs_of(tokens[some], mask[some]))
        total += summed_loss(
            logits, part["targets"][some], part["weights"][some]
        )
    return float(total / part["weights"].sum())


def summed_loss(logits, targets, weights):
    lost = keras.losses.sparse_categorical_crossentropy(
        keras.ops.convert_to_tensor(targets),
        keras.ops.convert_to_tensor(logits),
        from_logits=True,
    )
    return float(keras.ops.sum(keras.ops.multiply(lost, weights)))
