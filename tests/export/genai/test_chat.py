"""One base with several adapters, exported and talked to in a terminal."""

import json
import re
import shutil
import subprocess
import sys

import keras_hub
import numpy as np
import onnxruntime_genai
import pytest
from described import logits
from test_shipped_tokenizer import byte_pairs

import keras_peft
from keras_peft.export import to_genai
from keras_peft_cli.chat import Folder

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
METHODS = {
    "formal": keras_peft.LoRA(rank=3),
    "curt": keras_peft.LoRA(rank=2, decompose=True),
    "soft": keras_peft.PrefixTuning(4),
}
LENGTH = 6
CHAT = "import keras_peft_cli.main as cli; cli.main({arguments!r})"
NO_KERAS = """
import sys
heavy = {"keras", "keras_peft", "tensorflow", "torch", "jax"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


@pytest.fixture(scope="module")
def model():
    tokenizer = byte_pairs("gpt2")
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=tokenizer.get_vocab_size(),
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=64,
        intermediate_dim=96,
        tie_word_embeddings=True,
    )
    model = keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)
    _move(model, 0, 0.3)
    return model


def _move(model, seed, size):
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        noise = rng.normal(0.0, size, variable.shape).astype("float32")
        variable.assign_add(noise)


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    """`{name: folder}` of one adapter by each method."""
    folders = {}
    for seed, (name, method) in enumerate(METHODS.items()):
        folders[name] = tmp_path_factory.mktemp("adapters") / name
        keras_peft.adapt(model, method)
        _move(model, seed, 0.3)
        keras_peft.save_adapter(model, folders[name])
        keras_peft.remove(model)
    return folders


@pytest.fixture(scope="module")
def report_and_folder(model, adapters, tmp_path_factory):
    root = tmp_path_factory.mktemp("exported")
    theirs = root / "hf"
    theirs.mkdir()
    byte_pairs("gpt2").save(str(theirs / "tokenizer.json"))
    settings = {"eos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (theirs / "tokenizer_config.json").write_text(json.dumps(settings))
    settings = {"max_position_embeddings": 256, "eos_token_id": 0}
    (theirs / "config.json").write_text(json.dumps(settings))
    report = to_genai(
        model,
        root / "out",
        tokenizer=byte_pairs("gpt2"),
        hf_folder=theirs,
        adapters=adapters,
        evaluation=["It was a truth, and a bitter one.", "The sea was quiet."],
    )
    return report, root / "out"


@pytest.fixture
def folder(report_and_folder):
    return report_and_folder[1]


def _chat(folder, text, *options, after=""):
    arguments = ["chat", str(folder), "--max-tokens", str(LENGTH), *options]
    code = CHAT.format(arguments=arguments) + after
    found = subprocess.run(
        [sys.executable, "-c", code], input=text.encode(), capture_output=True
    )
    # As bytes: else carriage returns in an answer would get lost.
    found.stdout, found.stderr = found.stdout.decode(), found.stderr.decode()
    return found


def _expected(model, folder, messages):
    """The most likely tokens in Keras, as the runtime writes them."""
    tokenizer = onnxruntime_genai.Tokenizer(
        onnxruntime_genai.Config(str(folder))
    )
    talk, answers = [], []
    for message in messages:
        talk.append({"role": "user", "content": message})
        prompt = tokenizer.apply_chat_template(json.dumps(talk))
        ids = tokenizer.encode(prompt).tolist()
        stream, answer = tokenizer.create_stream(), ""
        for _ in range(LENGTH):
            ids.append(int(logits(model, [ids])[0, -1].argmax()))
            answer += stream.decode(ids[-1])
        answers.append(answer)
        talk.append({"role": "assistant", "content": answer})
    return "".join(f"{answer}\n" for answer in answers)


@pytest.mark.parametrize("name", [None, *METHODS])
def test_answers_are_those_of_keras(name, model, adapters, folder):
    messages = ["Who wrote to her?", "And the sea?"]
    options = [] if name is None else ["--adapter", name]
    found = _chat(folder, "\n".join(messages), *options)
    assert found.returncode == 0, found.stderr
    if name is not None:
        keras_peft.load_adapter(model, adapters[name])
    expected = _expected(model, folder, messages)
    if name is not None:
        keras_peft.remove(model)
    assert found.stdout == expected
    assert found.stderr == ""


def test_chatting_imports_no_keras(folder):
    found = _chat(folder, "Hello\n", after=NO_KERAS)
    assert found.returncode == 0, found.stderr


def test_an_end_token_ends_the_answer(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    chat = Folder(copy)
    talk = [{"role": "user", "content": "Who wrote to her?"}]
    whole = list(chat.answer(talk, LENGTH))
    config = json.loads((copy / "genai_config.json").read_text())
    end = chat._tokenizer.encode("".join(whole)).tolist()
    for id in sorted(set(end)):
        config["model"]["eos_token_id"] = [int(id)]
        (copy / "genai_config.json").write_text(json.dumps(config))
        shorter = list(Folder(copy).answer(talk, LENGTH))
        if len(shorter) < len(whole):
            assert shorter == whole[: len(shorter)]
            return
    raise AssertionError("no token of the answer ended it")


def test_the_report_tells_of_every_adapter(report_and_folder):
    report, folder = report_and_folder
    notes = "\n".join(report.notes)
    assert re.search(r"'formal': rank 3, .*loss is [\d.]+", notes)
    assert re.search(r"'curt': rank 64, .*misses at most", notes)
    assert re.search(r"'soft': 4 virtual tokens", notes)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {e["file"] for e in manifest["adapters"].values()} <= set(
        manifest["files"]
    )


# -- Errors ------------------------------------------------------------------


def test_an_unknown_adapter_is_told_with_those_that_exist(folder):
    found = _chat(folder, "Hello\n", "--adapter", "frmal")
    assert found.returncode == 1
    assert re.search("'formal', 'curt', 'soft'.*frmal", found.stderr)


def test_a_folder_that_is_none_is_told(tmp_path):
    found = _chat(tmp_path, "Hello\n")
    assert found.returncode == 1
    assert "without manifest.json" in found.stderr


def test_a_missing_adapter_file_is_told(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "formal.onnx_adapter").unlink()
    with pytest.raises(ValueError, match="'formal.onnx_adapter' is missing"):
        Folder(copy, "formal")


@pytest.mark.parametrize("names", [["a/b"], ["Formal", "formal"], [""]])
def test_names_that_no_disk_keeps_apart_are_refused(
    names, model, adapters, tmp_path
):
    folders = {name: adapters["formal"] for name in names}
    with pytest.raises(ValueError, match="name is that of its file"):
        to_genai(model, tmp_path / "out", adapters=folders)
    assert not (tmp_path / "out").exists()
