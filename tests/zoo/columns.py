"""What is shown of every model: one function for each column of the table.

A column takes a `Subject` and raises where the model does not hold it.
"""

import contextlib
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_peft
from keras_peft import adapter_state
from keras_peft import layer_tree
from keras_peft.targets import Candidates
from keras_peft.targets import find_head
from zoo.case import Case

RANK = 2

# A sum of up to a few hundred products in float32, in another order, through
# some tens of layers that each may magnify what came before.
ROUNDING = 2.0**-23 * 256


class Subject:
    """A case on its way from the plain model to the merged one.

    Attributes:
        case: The case.
        model: Plain, then adapted, then merged.
        batch: Inputs.
        plain: Outputs of the model before it was adapted.
        adapted: Outputs with a trained adapter.
        int8: The merged model's export, once it was made.
    """

    def __init__(self, case: Case):
        self.case = case
        self.model = case.build()
        self.batch = case.batch(self.model)
        self.plain = outputs(self.model, self.batch)
        self.adapted: list[np.ndarray] = []
        self.int8: Any = None


def targets(subject: Subject) -> str:
    """Every group finds the layers of the architecture; returns the counts."""
    accepts = keras_peft.LoRA().accepts
    candidates = Candidates(subject.model, find_head(subject.model), accepts)
    found = {name: len(candidates.group(name)) for name in subject.case.counts}
    wanted = subject.case.counts
    assert found == wanted, f"found {found}, the architecture has {wanted}"
    chosen = sum(wanted[name] for name in subject.case.default)
    default = len(candidates.default())
    assert default == chosen, f"default: {default} layers instead of {chosen}"
    return ", ".join(f"{n} {name}" for name, n in found.items() if n)


def train(subject: Subject) -> None:
    """`fit` moves every variable of the adapter, and no bit of the base."""
    model, case = subject.model, subject.case
    _adapt(subject)
    leaves = adapter_state.leaves(model, "default")
    learned = {
        f"{path}: {key}": variable
        for path, leaf in leaves.items()
        for key, variable in leaf.parameters.items()
    }
    head = adapter_state.head_variables(model)
    kept = {id(v) for v in (*learned.values(), *head.values())}
    base = [
        (v, bits(v))
        for v in model.variables
        if id(v) not in kept and not layer_tree.is_generator(v)
    ]
    before = {key: bits(variable) for key, variable in learned.items()}
    labels = case.targets(model, subject.batch)
    compile_plainly(model, case)
    # The second factor leaves zero in the first step, and so moves the first
    # one in the second.
    weights = case.weights(subject.batch) if case.weights else None
    with preprocessed(model):
        model.fit(
            subject.batch,
            labels,
            sample_weight=weights,
            batch_size=3,
            epochs=2,
            verbose=0,
        )
    still = [key for key, v in learned.items() if bits(v) == before[key]]
    still = [
        key for key in still if not any(re.search(p, key) for p in case.idle)
    ]
    assert not still, f"without a gradient: {still}"
    moved = [v.path for v, value in base if bits(v) != value]
    assert not moved, f"base weights changed: {moved}"
    _keep_outputs(subject)


def move(subject: Subject) -> None:
    """Moves the adapter without training it."""
    _adapt(subject)
    rng = np.random.default_rng(3)
    for leaf in adapter_state.leaves(subject.model, "default").values():
        for variable in leaf.parameters.values():
            variable.assign(rng.normal(scale=0.1, size=variable.shape))
    _keep_outputs(subject)


def _adapt(subject):
    """Adds an adapter, which changes nothing yet."""
    keras_peft.adapt(subject.model, keras_peft.LoRA(rank=RANK))
    equal(outputs(subject.model, subject.batch), subject.plain)


def _keep_outputs(subject):
    """Keeps what the model computes with an adapter that moved."""
    subject.adapted = outputs(subject.model, subject.batch)
    assert all(np.isfinite(output).all() for output in subject.adapted)
    assert distance(subject.adapted, subject.plain) > 0


def generate(subject: Subject) -> None:
    """Greedy tokens with a cache are those of the model called on them all."""
    model, case = subject.model, subject.case
    batch = {key: np.asarray(v) for key, v in subject.batch.items()}
    key = "decoder_token_ids" if "decoder_token_ids" in batch else "token_ids"
    mask = key.replace("token_ids", "padding_mask")
    prompt = batch if case.prompt is None else case.prompt(batch)
    prompt = {**prompt, mask: prompt[mask].astype(bool)}
    model.compile(sampler="greedy")
    # What `model.generate()` calls: without a preprocessor that fails over an
    # output that is None, as Gemma3's images.
    found = model.make_generate_function()(prompt, stop_token_ids=None)
    tokens = keras.ops.convert_to_numpy(found[key])
    whole = {**batch, key: tokens, mask: np.ones(tokens.shape, "int32")}
    if "response_mask" in batch:  # A prompt sees all of itself.
        whole["response_mask"] = (~prompt[mask]).astype("int32")
    logits = keras.ops.convert_to_numpy(model(whole, training=False))
    scale = np.abs(logits).max()
    for row, open_places in enumerate((~prompt[mask]).sum(-1)):
        for place in range(tokens.shape[1] - open_places, tokens.shape[1]):
            scores = logits[row, place - 1]
            best = scores.max() - scores[tokens[row, place]]
            assert best <= ROUNDING * scale, (row, place, best / scale)


def save(subject: Subject) -> None:
    """An adapter file brings a fresh model to the same outputs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "adapter"
        keras_peft.save_adapter(subject.model, folder)
        fresh = subject.case.build()
        keras_peft.load_adapter(fresh, folder)
    equal(outputs(fresh, subject.batch), subject.adapted)


def merge(subject: Subject) -> None:
    """Merged outputs are the adapted ones; `unmerge` brings the bits back."""
    model = subject.model
    adapter = [bits(v) for v in model.variables]
    keras_peft.merge(model)
    near(outputs(model, subject.batch), subject.adapted)
    keras_peft.unmerge(model)
    assert [bits(v) for v in model.variables] == adapter
    equal(outputs(model, subject.batch), subject.adapted)
    keras_peft.merge(model)


def onnx(subject: Subject) -> None:
    """The float32 graph equals the merged model on other shapes."""
    from keras_peft.export.build import build_onnx

    try:
        # On the way to int8 the float32 graph is held to the same.
        subject.int8 = build_onnx(subject.model, quantize="int8")
    except Exception:
        build_onnx(subject.model)


def onnx_int8(subject: Subject) -> str:
    """The int8 graph runs on other shapes; returns its cosine."""
    from keras_peft.export.build import build_onnx

    found = subject.int8 or build_onnx(subject.model, quantize="int8")
    return f"{found.verification[-1].cosine:.3f}"


def litert(subject: Subject) -> None:
    """The float32 LiteRT file equals the merged model on other shapes."""
    from keras_peft.export.litert.build import build_litert

    build_litert(subject.model)


COLUMNS: dict[str, Callable[[Subject], str | None]] = {
    "targets": targets,
    "train": train,
    "generate": generate,
    "save": save,
    "merge": merge,
    "onnx": onnx,
    "onnx int8": onnx_int8,
    "litert": litert,
}
# What stands in for a column that keras-hub itself cannot run, or that is but
# a step on the way to another.
INSTEAD = {"train": move}
# What a column starts from.
NEEDS = {
    "generate": "train",
    "save": "train",
    "merge": "train",
    "onnx": "merge",
    "onnx int8": "merge",
    "litert": "merge",
}


def has_column(case: Case, column: str) -> bool:
    """Whether a column means something for a class."""
    import keras_hub

    if column != "generate":
        return True
    kind = getattr(keras_hub.models, case.kind)
    generating = keras_hub.models.CausalLM, keras_hub.models.Seq2SeqLM
    return issubclass(kind, generating)


def outputs(model, batch):
    """What a model computes, flat, in float32."""
    found = keras.tree.flatten(model(batch, training=False))
    return [
        keras.ops.convert_to_numpy(keras.ops.cast(o, "float32")) for o in found
    ]


def bits(variable):
    """The exact value of a variable."""
    return keras.ops.convert_to_numpy(variable).tobytes()


def distance(found, wanted):
    """The largest difference, relative to the largest value of an output."""
    return max(
        np.abs(a - b).max(initial=0.0) / max(np.abs(b).max(initial=0.0), 1e-30)
        for a, b in zip(found, wanted, strict=True)
    )


def near(found, wanted):
    """Holds outputs to each other up to rounding."""
    assert distance(found, wanted) <= ROUNDING, distance(found, wanted)


def equal(found, wanted):
    """Holds outputs to each other bit for bit."""
    assert distance(found, wanted) == 0, distance(found, wanted)


def compile_plainly(model, case):
    """Mean squared errors for outputs of any structure."""
    # Steps by the sign: in a random model some gradients are tiny. Each one
    # is shorter, so that a step back does not end where the first began.
    rate = keras.optimizers.schedules.ExponentialDecay(1e-2, 1, 0.7)
    optimizer = keras.optimizers.Lion(rate)
    if case.labels is not None:
        model.compile(optimizer=optimizer)
        return
    # The metrics of a task want its own kind of labels.
    keras.Model.compile(model, optimizer=optimizer, loss="mse", metrics=[])


@contextlib.contextmanager
def preprocessed(model):
    """Within, `fit` takes batches as the model is called with them."""
    preprocessor = getattr(model, "preprocessor", None)
    if preprocessor is not None:
        model.preprocessor = None
    yield
    if preprocessor is not None:
        model.preprocessor = preprocessor
