"""Every kind of model becomes a LiteRT file that equals it."""

import json
import re
import subprocess
import sys

import exported
import keras
import model_table
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

import keras_peft
from keras_peft import export
from keras_peft.export.graph import TracingError
from keras_peft.export.litert import decoder
from keras_peft.export.litert import flatbuffer
from keras_peft.export.litert.build import build_litert

# Models that write text, and are checked with their caches.
LMS = ("llama", "gemma")
# Of half a step of 8 bits, and of one of 11 bits.
INT8_STEP = 0.5 / 127
FLOAT16_STEP = 2.0**-11


def run(content, batch):
    """What the interpreter gives, by name of the output."""
    interpreter = Interpreter(model_content=content)
    return interpreter.get_signature_runner()(**batch)


def kinds(content):
    """The operators of a file."""
    return {
        graph.kind(node)
        for graph in flatbuffer.graphs(flatbuffer.read(content))
        for node in graph.nodes
    }


def constants(content):
    """`(name, array, operators that read it)` of every constant."""
    for graph in flatbuffer.graphs(flatbuffer.read(content)):
        uses = graph.uses()
        for index in range(len(graph.tensors)):
            array = graph.array(index)
            if array is not None:
                readers = {graph.kind(node) for node, _ in uses[index]}
                yield graph.name(index), array, readers


def check_every_promise(model):
    """What must hold for an export of any model."""
    result = build_litert(model, quantize="int8")
    exact, small = result.verification
    # The bound counts roundings (comparison.rounding_of).
    assert exact.relative <= exact.tolerance < 1e-3
    # 8 bits: a wrong file of random weights has a cosine near 0.
    assert small.cosine > 0.95
    assert len(exact.shapes) >= 2
    assert exact.shapes[0] != exact.shapes[1]
    assert result.sizes["int8"] == len(result.model.content)
    assert not {"CUSTOM", "DELEGATE"} & kinds(result.model.content)
    interpreter = Interpreter(model_content=result.model.content)
    prompt = decoder.PREFILL if result.model.generates else None
    given = interpreter.get_signature_runner(prompt).get_input_details()
    assert {
        name: [*details["shape_signature"]] for name, details in given.items()
    } == {
        spec.name: [-1 if isinstance(n, str) else n for n in spec.shape]
        for spec in result.inputs
    }
    large = [
        array.dtype
        for _, array, readers in constants(result.model.content)
        if readers and 3 * array.size > 12 * max(array.shape, default=0) + 256
    ]
    assert np.dtype("float32") not in large
    return result


@pytest.mark.parametrize("name", model_table.QUICK)
def test_a_file_equals_the_model_on_other_shapes(name):
    check_every_promise(model_table.make(name))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Layer '.*' .of type T5")
@pytest.mark.parametrize(
    "name", [name for name in model_table.SLOW if name not in ("sam",)]
)
def test_a_file_of_every_kind_equals_the_model(name):
    check_every_promise(model_table.make(name))


@pytest.fixture(scope="module")
def small():
    ids = keras.Input((None,), dtype="int32", name="ids")
    x = keras.layers.Embedding(300, 32, name="table")(ids)
    x = keras.layers.Dense(40, activation="gelu", name="kernel")(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    model = keras.Model(ids, keras.layers.Dense(4, name="scores")(x))
    # A bias of zeros would be left out.
    model.set_weights([w + 0.01 * (w == 0) for w in model.get_weights()])
    results = {q: build_litert(model, q) for q in ("float16", "int8")}
    return model, results


def test_inputs_and_outputs_carry_the_names_of_the_model(small):
    _, results = small
    for result in results.values():
        (given,), (found,) = result.inputs, result.outputs
        assert (given.name, given.shape) == ("ids", ("batch", "sequence"))
        assert (found.name, found.shape) == ("scores", ("batch", 4))
        batch = {"ids": np.zeros((2, 3), "int32")}
        assert [*run(result.model.content, batch)] == ["scores"]


def test_weights_carry_the_paths_of_their_variables(small):
    model, results = small
    names = {name for name, *_ in constants(results["int8"].model.content)}
    assert {variable.path for variable in model.variables} <= names


def test_the_token_table_is_stored_and_read_in_8_bits(small):
    model, results = small
    found = {
        name: (array, readers)
        for name, array, readers in constants(results["int8"].model.content)
    }
    rows, readers = found["table/embeddings"]
    assert rows.dtype == np.int8 and readers == {"GATHER"}
    scale, _ = found["table/embeddings/scale"]
    table = keras.ops.convert_to_numpy(model.get_layer("table").embeddings)
    # Half a step, and the float32 rounding of the quotient.
    assert np.abs(rows * scale - table).max() <= 0.501 * scale.max()


@pytest.mark.parametrize(
    ("quantize", "num_bytes"), [("int8", 1), ("float16", 2)]
)
def test_every_weight_is_stored_once_in_its_bits(small, quantize, num_bytes):
    model, results = small
    exact = results[quantize].sizes["float32"]
    saved = exact - results[quantize].sizes[quantize]
    matrices = [v for v in model.variables if len(v.shape) > 1]
    size = sum(int(np.prod(v.shape)) for v in matrices)
    # 8 bits need a scale in float32 per output or token, an offset in int64
    # per output, and the operators of a look-up.
    rows = 4 * 300 + 12 * (40 + 4)
    assert saved >= (4 - num_bytes) * size - rows - 2048


@pytest.mark.parametrize(
    ("quantize", "step"), [("int8", INT8_STEP), ("float16", FLOAT16_STEP)]
)
def test_fewer_bits_cost_no_more_than_their_rounding(small, quantize, step):
    model, results = small
    ids = np.arange(12, dtype="int32").reshape(3, 4)
    want = keras.ops.convert_to_numpy(model(ids))
    got = run(results[quantize].model.content, {"ids": ids})["scores"]
    # Three products in a row, of two rounded factors each.
    assert np.abs(got - want).max() <= 6 * step * np.abs(want).max()
    errors = results[quantize].model.weight_errors(
        results[quantize].float_model
    )
    assert {error.stored for error in errors} == {quantize}
    assert all(0 < error.relative <= 2 * step for error in errors)


def test_a_tolerance_that_int8_misses_discards_the_file(small):
    model, _ = small
    with pytest.raises(ValueError, match="more than the tolerance"):
        build_litert(model, quantize="int8", tolerance=1e-9)


def test_a_model_that_computes_something_else_elsewhere_is_refused():
    model = model_table.with_layer(model_table.OwnToTheProcess())
    with pytest.raises(ValueError, match="differs from the model"):
        build_litert(model)


def test_an_unknown_precision_is_refused(small):
    with pytest.raises(ValueError, match="Received: quantize='int3'"):
        build_litert(small[0], quantize="int3")


def write(content, prompt, count, room):
    """Tokens that a file writes greedily after a prompt."""
    interpreter = Interpreter(model_content=content)
    step = interpreter.get_signature_runner(decoder.PREFILL)
    state = decoder.empty_caches(step, len(prompt), room)
    tokens, written = prompt, [prompt]
    for _ in range(count):
        place = np.array(sum(w.shape[1] for w in written[:-1]), "int32")
        state = step(token_ids=tokens, cache_update_index=place, **state)
        tokens = state.pop("logits")[:, -1:].argmax(-1).astype("int32")
        written.append(tokens)
        step = interpreter.get_signature_runner(decoder.DECODE)
    return np.concatenate(written, axis=1)


@pytest.mark.parametrize(
    "name", ["gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in LMS)]
)
def test_a_decoder_writes_with_a_cache_what_keras_writes(name):
    model = model_table.make(name)
    result = build_litert(model)
    names = [spec.name for spec in result.inputs]
    assert names == ["token_ids", "cache", "cache_update_index"]
    prompt = np.array([[5, 9, 2], [7, 7, 1]], "int32")
    # Room to spare: what is not written yet must not matter.
    written = write(result.model.content, prompt, count=5, room=13)
    for length in range(3, 8):
        text = written[:, :length]
        logits = model({"token_ids": text, "padding_mask": np.ones_like(text)})
        best = keras.ops.convert_to_numpy(logits)[:, -1].argmax(-1)
        assert (written[:, length] == best).all()
    # Both signatures read one copy of the weights, a tied table included.
    size = 4 * sum(int(np.prod(v.shape)) for v in model.variables)
    operators = 120_000
    assert result.sizes["float32"] < size + operators


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`(folder, model, report)` of an int8 export with labels."""
    target = tmp_path_factory.mktemp("litert") / "tiny"
    model = exported.tiny_classifier()
    report = export.to_litert(
        model,
        target,
        quantize="int8",
        calibration=exported.TEXTS,
        labels=exported.LABELS,
        evaluation=(exported.TEXTS, exported.CLASSES),
    )
    return target, model, report


def test_the_folder_is_complete_and_verifies(folder):
    target, model, report = folder
    manifest = json.loads((target / "manifest.json").read_text("utf-8"))
    assert set(manifest["files"]) | {"manifest.json"} == {
        file.name for file in target.iterdir()
    }
    assert manifest["files"]["model.tflite"]["bytes"] == report.final.num_bytes
    assert set(manifest["operators"]) == kinds(
        (target / "model.tflite").read_bytes()
    )
    assert [step.name for step in report.steps] == ["keras", "float32", "int8"]
    assert report.final.accuracy is not None
    assert "LiteRT" in (target / "report.html").read_text("utf-8")
    found = export.verify(target, model, exported.TEXTS)
    assert found.final.relative <= 10 * report.final.relative


def test_a_folder_does_not_verify_against_other_weights(folder):
    keras.utils.set_random_seed(1)
    with pytest.raises(ValueError, match="does not compute what"):
        export.verify(folder[0], exported.tiny_classifier())


def test_the_readme_gives_the_class_of_keras_without_keras(folder, tmp_path):
    target, model, report = folder
    readme = (target / "README.md").read_text("utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    text = re.search(r'encode_batch\(\["(.*)"\]\)', snippet)[1]
    script = tmp_path / "script.py"
    show = "\nprint(outputs['logits'][0].tolist())\nimport sys\n"
    script.write_text(snippet + show + "assert 'keras' not in sys.modules\n")
    result = subprocess.run(
        [sys.executable, "-I", str(script)],
        cwd=target,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    want = model(model.preprocessor([text]), training=False)
    want = keras.ops.convert_to_numpy(want)[0]
    got = json.loads(result.stdout.splitlines()[-1])
    # What the report states for int8, with room for another sample.
    room = 10 * report.final.relative * np.abs(want).max()
    np.testing.assert_allclose(got, want, atol=room)
    assert result.stdout.split()[0] in exported.LABELS


def test_everything_wrong_is_said_at_once_and_nothing_is_written(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    keras_peft.adapt(model, keras_peft.LoRA(rank=2), targets=["dense"])
    target = tmp_path / "model"
    with pytest.raises(ValueError) as error:
        export.to_litert(model, target, labels=["a"])
    for part in ("keras_peft.merge(model)", "one name per class"):
        assert part in str(error.value)
    assert not target.exists()


@keras.saving.register_keras_serializable("tests")
class Determinant(keras.layers.Layer):
    """A layer of an operator that LiteRT does not have."""

    def call(self, inputs):
        return inputs * keras.ops.det(inputs[:, None] * inputs[:, :, None])[0]


def test_an_operator_that_the_runtime_lacks_is_named(tmp_path):
    model = model_table.with_layer(Determinant())
    with pytest.raises(
        TracingError, match="tf.MatrixDeterminant in .*determinant"
    ):
        export.to_litert(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
