"""The code in the README runs the model where Keras is not."""

import re
import subprocess
import sys

import exported
import keras
import keras_hub
import numpy as np
import pytest
from test_tokenizer import sentence_piece

from keras_peft import export
from keras_peft.export.preprocessor import describe_preprocessor
from keras_peft.export.result import TensorSpec
from keras_peft.export.snippet import TEXT
from keras_peft.export.snippet import code

SHOW = """
import sys
for name in sys.modules:
    assert name.split(".")[0] not in ("keras", "keras_hub", "keras_peft"), name
print("OUTPUT", np.asarray(outputs[0], "float64").ravel().tolist())
"""


def run_readme(folder, tmp_path):
    """Runs the snippet in `folder`; returns what it prints."""
    readme = (folder / "README.md").read_text("utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    script = tmp_path / "script.py"
    script.write_text(snippet + SHOW, "utf-8")
    result = subprocess.run(
        [sys.executable, "-I", str(script)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def numbers(printed):
    line = printed.split("OUTPUT ")[1].strip()
    return np.array([float(n) for n in line.strip("[]").split(",")])


def test_the_readme_of_a_classifier_gives_the_logits_of_keras(tmp_path):
    folder, model, report = exported.exported()
    printed = run_readme(folder, tmp_path)
    expected = model(model.preprocessor([TEXT]), training=False)
    expected = keras.ops.convert_to_numpy(expected).ravel()
    # What the report states for int8, with room for another sample.
    room = 10 * report.final.relative * np.abs(expected).max()
    np.testing.assert_allclose(numbers(printed), expected, atol=room)
    assert printed.split()[0] in exported.LABELS


def test_the_readme_of_an_image_model_scales_as_keras_does(tmp_path):
    converter = keras_hub.layers.ImageConverter(
        image_size=(6, 5), scale=[0.1, 0.2, 0.3], offset=[-1.0, 0.0, 2.0]
    )
    model = keras.Sequential(
        [keras.Input((6, 5, 3)), keras.layers.Flatten(), keras.layers.Dense(2)]
    )
    export.to_onnx(model, tmp_path / "image", preprocessor=converter)
    pixels = np.full((1, 6, 5, 3), 128.0, "float32")
    scaled = keras.ops.convert_to_numpy(converter(pixels))
    expected = keras.ops.convert_to_numpy(model(scaled)).ravel()
    printed = run_readme(tmp_path / "image", tmp_path)
    # Float32 sums of 90 products.
    np.testing.assert_allclose(numbers(printed), expected, rtol=1e-4)


def test_the_readme_of_a_model_of_arrays_runs(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    export.to_onnx(model, tmp_path / "plain")
    expected = keras.ops.convert_to_numpy(model(np.ones((1, 3)))).ravel()
    printed = run_readme(tmp_path / "plain", tmp_path)
    np.testing.assert_allclose(numbers(printed), expected, rtol=1e-5)


@pytest.mark.parametrize("length", [None, 16])
def test_a_shipped_sentence_piece_model_gives_the_ids_of_keras(
    tmp_path, length
):
    layer = keras_hub.tokenizers.SentencePieceTokenizer(
        proto=sentence_piece(model_type="WORD"), sequence_length=length
    )
    specs = [TensorSpec("tokens", "int32", ("batch", "tokens"))]
    preprocessing = describe_preprocessor(layer, specs)
    preprocessing.write(tmp_path)
    before_the_run = code(specs, preprocessing).split("outputs = ")[0]
    lines = before_the_run.split("\n")
    kept = [line for line in lines if "onnxruntime" not in line]
    script = "\n".join([*kept, "print(inputs['tokens'].tolist()[0])"])
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    expected = [int(id) for id in layer(TEXT)]
    assert result.stdout.strip() == str(expected)
