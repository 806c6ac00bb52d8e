"""Adapter folders: whole or not at all, and checked before they are used."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import keras
import numpy as np
import pytest
import safetensors.numpy
from models import build
from models import outputs
from models import same_bits
from models import values
from table import randomize

import keras_peft
from keras_peft.files import existing_folder
from keras_peft.files import whole_folder
from keras_peft.fingerprint import fingerprint

NAME = "bert-classifier"
TENSORS = "adapter.safetensors"
SETTINGS = "adapter.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = build(NAME)
    keras_peft.adapt(model, keras_peft.LoRA(2))
    randomize(model)
    folder = tmp_path_factory.mktemp("adapters") / "good"
    keras_peft.save_adapter(model, folder)
    return folder


def rewrite(folder, change):
    """Applies `change(settings, tensors)` and makes the checksum fit."""
    import hashlib

    settings = json.loads((folder / SETTINGS).read_text())
    tensors = safetensors.numpy.load_file(folder / TENSORS)
    change(settings, tensors)
    data = safetensors.numpy.save(tensors)
    settings["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / TENSORS).write_bytes(data)
    (folder / SETTINGS).write_text(json.dumps(settings))


def first(tensors):
    return next(key for key in sorted(tensors) if key.endswith("kernel_a"))


def drop(settings, tensors):
    del tensors[first(tensors)]


def add(settings, tensors):
    tensors["../../etc/passwd"] = np.zeros(3, "float32")


def reshape(settings, tensors):
    tensors[first(tensors)] = np.zeros((3, 3), "float32")


def poison(settings, tensors):
    tensors[first(tensors)][0, 0] = np.nan


def transpose(settings, tensors):
    key = first(tensors)
    tensors[key] = np.ascontiguousarray(tensors[key].T)


def rename_layer(settings, tensors):
    layers = settings["layers"]
    layers["backbone.transformer_layers.7.query"] = layers.popitem()[1]


def escape(settings, tensors):
    settings["layers"]["../../../secret"] = settings["layers"].popitem()[1]


def code(settings, tensors):
    settings["method"] = {"name": "os.system", "settings": {"command": "id"}}


def unknown_setting(settings, tensors):
    settings["method"]["settings"]["shell"] = "id"


def bad_rank(settings, tensors):
    settings["method"]["settings"]["rank"] = 10**9


def newer(settings, tensors):
    settings["version"] = 99


def foreign(settings, tensors):
    settings["format"] = "another library"


def incomplete(settings, tensors):
    del settings["head"]


CHANGES = {
    drop: "missing `backbone",
    add: "unexpected `../../etc/passwd`",
    reshape: "has shape (3, 3), not (",
    poison: "holds NaN or infinity",
    transpose: "has shape (2, 8), not (8, 2)",
    rename_layer: "no layer `backbone.transformer_layers.7.query`",
    escape: "no layer `../../../secret`",
    code: "knows the methods LoRA",
    unknown_setting: "settings of LoRA cannot be read",
    bad_rank: "is larger than its kernel",
    newer: "of version 99",
    foreign: "another library",
    incomplete: "is damaged",
}


@pytest.mark.parametrize(
    "change, words", CHANGES.items(), ids=lambda c: getattr(c, "__name__", "")
)
def test_a_hostile_folder_is_refused_and_changes_nothing(
    change, words, saved, tmp_path
):
    folder = tmp_path / "bad"
    shutil.copytree(saved, folder)
    rewrite(folder, change)
    model = build(NAME)
    before = values(model.variables)
    with pytest.raises(ValueError) as caught:
        keras_peft.load_adapter(model, folder)
    assert words in str(caught.value)
    assert "Received: " in str(caught.value)
    assert same_bits(before, values(model.variables))
    assert not hasattr(model, "peft")


def truncate(folder):
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[: len(data) // 2])


def pickled(folder):
    (folder / TENSORS).write_bytes(pickle.dumps({"weights": [1, 2]}))


def without_tensors(folder):
    (folder / TENSORS).unlink()


def without_settings(folder):
    (folder / SETTINGS).unlink()


def no_json(folder):
    (folder / SETTINGS).write_bytes(b"\x80\x04\x95 not json")


@pytest.mark.parametrize(
    "damage", [truncate, pickled, without_tensors, without_settings, no_json]
)
def test_a_damaged_folder_is_refused(damage, saved, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(saved, folder)
    damage(folder)
    with pytest.raises(ValueError, match="Received: "):
        keras_peft.load_adapter(build(NAME), folder)


def test_a_pickle_under_the_right_checksum_is_refused_unopened(saved, tmp_path):
    import hashlib

    folder = tmp_path / "bad"
    shutil.copytree(saved, folder)
    pickled(folder)
    settings = json.loads((folder / SETTINGS).read_text())
    data = (folder / TENSORS).read_bytes()
    settings["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="is no safetensors file"):
        keras_peft.load_adapter(build(NAME), folder)


def test_another_base_is_refused(saved):
    model = build(NAME)
    kernel = model.backbone.transformer_layers[1]._feedforward_output_dense
    kernel.kernel.assign(kernel.kernel + 1e-3)
    with pytest.raises(ValueError, match="1 of 3. base weights have other"):
        keras_peft.load_adapter(model, saved)
    with pytest.raises(ValueError, match="no layer `backbone.transformer"):
        keras_peft.load_adapter(build("functional"), saved)


@pytest.mark.slice
def test_weights_without_a_name_are_told_by_their_layer():
    class Probe(keras.layers.Layer):
        def build(self, shape):
            self.probe = self.add_weight(shape=(3,), initializer="ones")

        def call(self, inputs):
            return inputs + self.probe

    inputs = keras.Input((3,))
    # Keras counts such weights on.
    one, other = (keras.Model(inputs, Probe()(inputs)) for _ in range(2))
    assert fingerprint(one, []) == fingerprint(other, [])


def test_the_same_base_in_another_dtype_is_accepted(saved):
    model = build(NAME)
    keras.config.set_dtype_policy("bfloat16")
    try:
        half = build(NAME)
    finally:
        keras.config.set_dtype_policy("float32")
    for target, source in zip(half.variables, model.variables, strict=True):
        target.assign(keras.ops.cast(source, target.dtype))
    keras_peft.load_adapter(half, saved)
    keras_peft.load_adapter(model, saved)
    expected = outputs(model, NAME)
    # Twenty roundings to bfloat16 one after another.
    limit = 20 * 2.0**-8 * np.abs(expected).max()
    found = outputs(half, NAME).astype("float32")
    assert np.abs(found - expected).max() <= limit


def test_loading_over_an_adapter_of_that_name(saved):
    model = build(NAME)
    keras_peft.load_adapter(model, saved)
    expected = outputs(model, NAME)
    randomize(model)
    keras_peft.load_adapter(model, saved)
    assert np.array_equal(outputs(model, NAME), expected)
    keras_peft.remove(model)
    keras_peft.adapt(model, keras_peft.LoRA(4))
    with pytest.raises(ValueError, match="other settings or layers"):
        keras_peft.load_adapter(model, saved)


@pytest.mark.slice
def test_the_folder_holds_the_adapter_and_no_weight_of_the_base(saved):
    assert {file.name for file in saved.iterdir()} == {SETTINGS, TENSORS}
    tensors = safetensors.numpy.load_file(saved / TENSORS)
    count = sum(value.size for value in tensors.values())
    # Twelve layers, of [8, 8], [8, 16] and [16, 8]; the head is [8, 3] and 3.
    assert count == 2 * (8 * 16 + 2 * 24 + 2 * 24) + 27


FRESH = """
import sys
sys.path[:0] = [{tests!r}]
import numpy as np
import keras_peft
from models import build, outputs
model = build({name!r})
keras_peft.load_adapter(model, {folder!r}, trainable=True)
assert len(model.trainable_variables) == 26, len(model.trainable_variables)
np.save({out!r}, outputs(model, {name!r}))
"""


@pytest.mark.slice
def test_a_fresh_process_gets_equal_outputs(saved, tmp_path):
    out = tmp_path / "outputs.npy"
    run(
        FRESH,
        tests=str(Path(__file__).parent),
        name=NAME,
        folder=str(saved),
        out=str(out),
    )
    model = build(NAME)
    keras_peft.load_adapter(model, saved)
    assert np.array_equal(np.load(out), outputs(model, NAME))


def run(code, check=True, **names):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code.format(**names)],
        capture_output=True,
        text=True,
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done


# -- Whole folders -----------------------------------------------------------

WRITE = textwrap.dedent(
    """
    import os, resource, signal, sys
    sys.path[:0] = [{root!r}]
    from keras_peft.files import whole_folder
    {before}
    with whole_folder({folder!r}) as staging:
        (staging / "one").write_bytes(b"1" * 1000)
        {during}
        (staging / "two").write_bytes(b"2" * 100_000)
    """
)
ROOT = str(Path(__file__).parent.parent)


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("cause", ["kill", "full"])
def test_a_kill_or_a_full_disk_leaves_what_was_there(cause, older, tmp_path):
    folder = tmp_path / "folder"
    if older:
        folder.mkdir()
        (folder / "old").write_text("old")
    done = run(
        WRITE,
        check=False,
        root=ROOT,
        folder=str(folder),
        # A limit on the size of files fails a write as a full disk does.
        before="signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))"
        if cause == "full"
        else "",
        during="os.kill(os.getpid(), signal.SIGKILL)"
        if cause == "kill"
        else "",
    )
    if cause == "kill":
        assert done.returncode == -signal.SIGKILL
    else:
        assert "The folder could not be written" in done.stderr
        assert not list(tmp_path.glob(".*"))
    visible = [path.name for path in tmp_path.glob("[!.]*")]
    assert visible == (["folder"] if older else [])
    if older:
        assert [path.name for path in folder.iterdir()] == ["old"]


def test_an_older_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "folder"
    for name in ("old", "new"):
        with whole_folder(folder) as staging:
            (staging / name).write_text(name)
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert os.stat(folder / "new").st_mode & 0o777 == 0o644


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    folder = tmp_path / "folder"
    with whole_folder(folder) as staging:
        (staging / "old").write_text("old")
    folder.rename(tmp_path / "folder.previous")
    assert [p.name for p in existing_folder(folder).iterdir()] == ["old"]
    with whole_folder(folder) as staging:
        (staging / "new").write_text("new")
    assert [p.name for p in existing_folder(folder).iterdir()] == ["new"]
