"""A folder is complete, is never half there, and shows what was changed."""

import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import exported
import keras
import numpy as np
import onnx
import pytest

import keras_peft
from keras_peft import export
from keras_peft.export.folder import write_folder
from keras_peft.export.preprocessor import Preprocessing
from keras_peft.export.report import ExportReport
from keras_peft.export.report import Step
from keras_peft.export.result import OnnxResult
from keras_peft.export.result import TensorSpec

FILES = {
    "README.md",
    "labels.json",
    "manifest.json",
    "model.onnx",
    "preprocessor.json",
    "report.html",
    "report.json",
    "tokenizer.json",
}


@pytest.fixture
def folder(tmp_path):
    """A copy of the exported folder that a test may spoil."""
    return shutil.copytree(exported.exported()[0], tmp_path / "copy")


def one_node_result(size=8):
    weight = np.ones((size, size), "float32")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "one",
        [onnx.helper.make_tensor_value_info("x", 1, ["batch", size])],
        [onnx.helper.make_tensor_value_info("y", 1, ["batch", size])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 18)]
    )
    spec = TensorSpec("x", "float32", ("batch", size))
    out = TensorSpec("y", "float32", ("batch", size))
    return OnnxResult(
        model, model, None, (spec,), (out,), "torch", (), (), (), {}
    )


REPORT = ExportReport("one", (Step("keras", 8), Step("float32", 8)))


def visible(parent):
    return sorted(p.name for p in parent.iterdir() if p.name[0] != ".")


def test_the_folder_is_complete_and_described():
    folder, _, _ = exported.exported()
    manifest = exported.read(folder, "manifest.json")
    assert set(visible(folder)) == FILES
    assert set(manifest["files"]) == FILES - {"manifest.json"}
    assert [entry["name"] for entry in manifest["inputs"]] == [
        "padding_mask",
        "segment_ids",
        "token_ids",
    ]
    assert manifest["inputs"][0]["shape"] == ["batch", "sequence"]
    assert manifest["quantization"] == "int8"
    assert exported.read(folder, "labels.json") == exported.LABELS


def test_every_file_is_named_in_the_readme():
    folder, _, _ = exported.exported()
    text = (folder / "README.md").read_text("utf-8")
    assert all(f"`{name}`" in text for name in FILES - {"README.md"})


def test_an_exported_folder_verifies():
    folder, model, _ = exported.exported()
    report = export.verify(folder, model)
    assert report.final.name == "int8"
    assert export.verify(folder, model, exported.TEXTS).final.latency_ms > 0


def test_all_missing_truncated_and_changed_files_are_named(folder):
    _, model, _ = exported.exported()
    (folder / "labels.json").unlink()
    content = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(content[:-1])
    text = (folder / "tokenizer.json").read_text("utf-8")
    (folder / "tokenizer.json").write_text(
        text.replace("film", "flim"), "utf-8"
    )
    with pytest.raises(ValueError) as error:
        export.verify(folder, model)
    for part in (
        "labels.json is missing",
        f"model.onnx has {len(content) - 1} bytes instead of {len(content)}",
        "tokenizer.json was changed",
    ):
        assert part in str(error.value)


def test_a_folder_of_someone_else_is_not_verified(tmp_path):
    (tmp_path / "manifest.json").write_text("{}", "utf-8")
    with pytest.raises(ValueError, match="not made by"):
        export.verify(tmp_path, None)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        export.verify(tmp_path / "none", None)


def test_a_folder_does_not_verify_against_other_weights(folder):
    keras.utils.set_random_seed(1)
    with pytest.raises(ValueError, match="does not compute what"):
        export.verify(folder, exported.tiny_classifier())


def test_a_folder_does_not_verify_against_other_inputs(folder):
    other = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="exported from another model"):
        export.verify(folder, other)


def test_an_older_export_is_replaced_and_other_folders_are_not(tmp_path):
    write_folder(
        tmp_path / "a", one_node_result(), Preprocessing(), None, REPORT
    )
    write_folder(
        tmp_path / "a", one_node_result(), Preprocessing(), None, REPORT
    )
    assert visible(tmp_path) == ["a"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x", "utf-8")
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="is not an export"):
        export.to_onnx(model, tmp_path / "mine")
    assert visible(tmp_path / "mine") == ["thesis.tex"]


def test_everything_wrong_is_said_at_once_and_nothing_is_written(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    keras_peft.adapt(model, keras_peft.LoRA(rank=2), targets=["dense"])
    file = tmp_path / "file"
    file.write_text("x", "utf-8")
    with pytest.raises(ValueError) as error:
        export.to_onnx(model, file, labels=["a"])
    for part in (
        "keras_peft.merge(model)",
        "names a file",
        "one name per class",
    ):
        assert part in str(error.value)
    assert visible(tmp_path) == ["file"]


def run(code, tmp_path):
    """Runs `code` after writing a first export to `<tmp_path>/a`."""
    head = """
    import os, resource, signal, sys
    sys.path.insert(0, sys.argv[2])
    from test_folder import *
    target = sys.argv[1] + "/a"
    """
    return subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(head) + textwrap.dedent(code),
            str(tmp_path),
            str(Path(__file__).parent),
        ],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_leaves_the_folder_as_it_was(tmp_path, exists):
    if exists:
        write_folder(
            tmp_path / "a", one_node_result(), Preprocessing(), None, REPORT
        )
    before = {p.name: p.read_bytes() for p in tmp_path.rglob("a/*")}
    result = run(
        """
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        large = one_node_result(200)
        write_folder(target, large, Preprocessing(), None, REPORT)
        """,
        tmp_path,
    )
    assert "File too large" in result.stderr
    assert {p.name: p.read_bytes() for p in tmp_path.rglob("a/*")} == before
    assert list(tmp_path.iterdir()) == ([tmp_path / "a"] if exists else [])


@pytest.mark.parametrize("exists", [False, True])
def test_a_kill_leaves_the_folder_as_it_was(tmp_path, exists):
    if exists:
        write_folder(
            tmp_path / "a", one_node_result(), Preprocessing(), None, REPORT
        )
    before = {p.name: p.read_bytes() for p in tmp_path.rglob("a/*")}
    result = run(
        """
        class Killer(ExportReport):
            def write(self, folder):
                assert (folder / "model.onnx").exists()
                os.kill(os.getpid(), signal.SIGKILL)
        write_folder(
            target, one_node_result(), Preprocessing(), None,
            Killer("one", REPORT.steps),
        )
        """,
        tmp_path,
    )
    assert result.returncode == -signal.SIGKILL
    assert {p.name: p.read_bytes() for p in tmp_path.rglob("a/*")} == before
    assert visible(tmp_path) == (["a"] if exists else [])
