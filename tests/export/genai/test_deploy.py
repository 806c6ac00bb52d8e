"""Folders that onnxruntime-genai runs, and what is refused."""

import contextlib
import io
import json
import re

import keras_hub
import numpy as np
import onnxruntime_genai
import pytest
from described import FAMILIES
from described import VOCABULARY
from described import build
from described import logits
from test_shipped_tokenizer import byte_pairs
from test_shipped_tokenizer import vocabulary

import keras_peft
from keras_peft.export import to_genai
from keras_peft.export import verify
from keras_peft.export.genai import checks

# The last token of the table's models: it ends an answer and fills a batch.
END = VOCABULARY - 1
TEXTS = [
    "It was a truth, and a bitter one, that nobody had written to her.",
    "def add(a, b):\n    return a + b\n",
    "The sea was quiet that evening, and so was everyone on the shore.",
]


def _move(model):
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        noise = rng.normal(0.0, 0.1, variable.shape).astype("float32")
        variable.assign_add(noise)
    return model


@pytest.fixture(scope="module")
def writer():
    """A small GPT-2 with its tokenizer."""
    vocab, merges = vocabulary(byte_pairs("gpt2"))
    tokenizer = keras_hub.models.GPT2Tokenizer(vocab, merges)
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=len(vocab),
        num_layers=2,
        num_heads=4,
        hidden_dim=64,
        intermediate_dim=96,
        max_sequence_length=128,
    )
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(
        tokenizer, sequence_length=64
    )
    model = keras_hub.models.GPT2CausalLM(backbone, preprocessor)
    return _move(model)


def _answers(folder, rows, count):
    """What the runtime goes on with, a batch of prompts at a time."""
    model = onnxruntime_genai.Model(str(folder))
    options = onnxruntime_genai.GeneratorParams(model)
    longest = max(map(len, rows))
    options.set_search_options(
        max_length=longest + count, do_sample=False, batch_size=len(rows)
    )
    generator = onnxruntime_genai.Generator(model, options)
    filled = [[*row, *[END] * (longest - len(row))] for row in rows]
    generator.append_tokens(np.array(filled, "int32"))
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(n)[longest:] for n in range(len(rows))]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_runtime_writes_what_keras_finds_most_likely(name, tmp_path):
    model = build(name)
    report = to_genai(model, tmp_path / "out", context_length=64)
    assert report.final.relative <= 2e-5  # As in test_families.
    config = json.loads((tmp_path / "out/genai_config.json").read_text())
    config["model"] |= {"pad_token_id": END, "eos_token_id": END}
    (tmp_path / "out/genai_config.json").write_text(json.dumps(config))
    rows = [[7, 3, 9, 1, 4, 4, 8, 2], [5, 6, 7]]
    for row, answer in zip(
        rows, _answers(tmp_path / "out", rows, 16), strict=True
    ):
        # What follows the end is padding.
        ends = [n for n, id in enumerate(answer, 1) if id == END]
        answer = answer[: ends[0] if ends else None]
        found = logits(model, [[*row, *answer]])[0]
        for place, token in enumerate(answer, len(row) - 1):
            # The most likely one, or as likely up to rounding.
            short = found[place].max() - found[place, token]
            assert short <= 1e-4 * np.abs(found).max()


@pytest.mark.parametrize("quantize", [None, "float16", "int8", "int4"])
def test_a_folder_holds_all_that_its_readme_needs(
    writer, tmp_path, quantize, monkeypatch
):
    report = to_genai(
        writer, tmp_path / "out", quantize=quantize, evaluation=TEXTS
    )
    keras, exact, *_ = report.steps
    assert exact.relative <= 2e-5
    assert abs(exact.loss - keras.loss) <= 1e-4 * keras.loss
    assert report.final.name == (quantize or "float32")
    assert report.final.latency_ms > 0
    assert any("tokens of text" in note for note in report.notes) == bool(
        quantize
    )
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["quantization"] == quantize
    assert manifest["context_length"] == 128
    code = re.search(
        r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.S
    )
    monkeypatch.chdir(tmp_path / "out")
    names = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code.group(1).replace("max_length=128", "max_length=20"), names)
    prompt = names["tokenizer"].encode(names["prompt"])
    assert names["generator"].is_done()
    assert len(names["generator"].get_sequence(0)) > len(prompt)
    assert not list(tmp_path.glob(".*"))


def test_fewer_bits_take_fewer_bytes_and_cost_more(writer, tmp_path):
    steps = {}
    for quantize in (None, "float16", "int8", "int4"):
        report = to_genai(
            writer, tmp_path / "out", quantize=quantize, evaluation=TEXTS
        )
        steps[quantize] = report.final
    sizes = [step.num_bytes for step in steps.values()]
    assert sizes == sorted(sizes, reverse=True)
    errors = [step.relative for step in steps.values()]
    assert errors == sorted(errors)


def test_a_folder_is_verified_later_and_elsewhere(writer, tmp_path):
    to_genai(writer, tmp_path / "out", quantize="int8")
    assert verify(tmp_path / "out", writer).final.name == "int8"
    other = _move(
        keras_hub.models.GPT2CausalLM.from_config(writer.get_config())
    )
    with pytest.raises(ValueError, match="exported from these weights"):
        verify(tmp_path / "out", other)
    data = tmp_path / "out/model.onnx.data"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.onnx.data has \d+ bytes"):
        verify(tmp_path / "out", writer)


def test_generation_settings_come_from_the_hugging_face_folder(
    writer, tmp_path
):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"max_position_embeddings": 64}')
    (source / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_p": 0.95, "transformers_version": "5"}'
    )
    to_genai(writer, tmp_path / "out", hf_folder=source)
    config = json.loads((tmp_path / "out/genai_config.json").read_text())
    assert config["search"]["temperature"] == 0.6
    assert config["search"]["top_p"] == 0.95
    assert "transformers_version" not in config["search"]


# -- What is refused ---------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int3"}, "quantize='int3'"),
        ({"context_length": 129}, "at most 128.*context_length=129"),
        ({"context_length": 0}, "context_length=0"),
        ({"evaluation": [""]}, "1 texts with nothing to predict"),
    ],
)
def test_arguments_that_fit_nothing_are_refused(
    writer, tmp_path, options, message
):
    with pytest.raises(ValueError, match=message):
        to_genai(writer, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_evaluation_needs_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="Pass it as `tokenizer`"):
        to_genai(build("llama"), tmp_path / "out", evaluation=TEXTS)
    assert not list(tmp_path.iterdir())


def test_adapters_must_be_merged(tmp_path):
    model = build("llama")
    keras_peft.adapt(model, keras_peft.LoRA(rank=2))
    with pytest.raises(ValueError, match=r"Call `keras_peft.merge\(model\)`"):
        to_genai(model, tmp_path / "out")
    keras_peft.merge(model)
    report = to_genai(model, tmp_path / "out")
    assert report.final.relative <= 2e-5


def test_adapters_that_are_no_change_of_weights_have_no_place(tmp_path):
    model = build("llama")
    keras_peft.adapt(model, keras_peft.BottleneckAdapter(reduction=16))
    with pytest.raises(ValueError, match="no place for them"):
        to_genai(model, tmp_path / "out")


def test_weights_that_are_no_numbers_are_named(tmp_path):
    model = build("llama")
    layer = model.backbone.transformer_layers[1]._feedforward_gate_dense
    values = np.array(layer.kernel)
    values[3, 4] = np.nan
    layer.kernel.assign(values)
    with pytest.raises(ValueError, match="1 such weights.*gate_dense"):
        to_genai(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(
        checks.shutil, "disk_usage", lambda _: type("", (), {"free": 1000})
    )
    with pytest.raises(OSError, match="no room.*1 kB free"):
        to_genai(build("llama"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_heads_that_the_operator_does_not_take_are_refused(tmp_path):
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=9,
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=16,
        max_sequence_length=32,
    )
    model = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
    with pytest.raises(ValueError, match="head_size=8"):
        to_genai(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_not_an_export_is_not_replaced(writer, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="would delete"):
        to_genai(writer, tmp_path)
    assert (tmp_path / "thesis.txt").exists()
