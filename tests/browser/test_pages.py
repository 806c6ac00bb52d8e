"""The pages in headless Chromium: typed into, clicked and read."""

import functools
import json
import shutil
import threading

import keras_hub
import make_site
import numpy as np
import onnxruntime
import pytest
import safetensors.numpy
import tokenizers
from exported import LABELS
from exported import exported
from serve import server
from test_shipped_tokenizer import byte_pairs

import keras_peft
from keras_peft.export import to_genai

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("needs apt-get install chromium", allow_module_level=True)
if not make_site.LIBRARIES.exists() and shutil.which("npm") is None:
    pytest.skip("needs apt-get install npm", allow_module_level=True)
playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs pip install playwright"
)
pytestmark = pytest.mark.slow

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PIECE = 16  # As in language_model.js: roundings depend on it.
LIMIT = 256
TEXTS = [
    "The film was good, very good!",
    "  two  spaces,\ttabs\n\nand lines  ",
    "naïve café, straße, ﬁne, ½ of 3.14 or ²",
    "def add(a, b):\n    return a + b  # it's 12345",
    "日本語 中文 한국어 Привет мир مرحبا שלום हिन्दी ไทย Ελληνικά",
    "😀👍🏽👩‍👩‍👧 don't we’ve I'LL",
    "<b> [MASK] <|endoftext|>",
    "good " * 40,
]


# -- The site ----------------------------------------------------------------


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """A small GPT-2 with an adapter, in float32."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = byte_pairs("smollm2")
    for name, settings in (
        ("config.json", {"eos_token_id": 0}),
        ("tokenizer_config.json", {"chat_template": TEMPLATE}),
    ):
        (folder / name).write_text(json.dumps(settings))
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=tokenizer.get_vocab_size(),
        num_layers=2,
        num_heads=4,
        hidden_dim=64,
        intermediate_dim=96,
        max_sequence_length=512,
    )
    model = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
    move(model, 0.1)
    keras_peft.adapt(model, keras_peft.LoRA(rank=4))
    move(model, 0.2)
    keras_peft.save_adapter(model, folder / "formal")
    keras_peft.remove(model)
    to_genai(
        model,
        folder / "out",
        tokenizer=tokenizer,
        hf_folder=folder,
        context_length=512,
        adapters={"formal": folder / "formal"},
    )
    return folder / "out"


def move(model, amount):
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        noise = rng.normal(0.0, amount, variable.shape).astype("float32")
        variable.assign_add(noise)


@pytest.fixture(scope="module")
def site(chat_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    make_site.make(out, exported()[0], chat_folder)
    return out


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        found = running.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield found
        found.close()


@pytest.fixture
def page(browser, site):
    """The site on the screen of a phone; no page may fail unheard."""
    served = server(site)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    context = browser.new_context(viewport={"width": 390, "height": 844})
    found = context.new_page()
    failures = []
    found.on("pageerror", lambda error: failures.append(error))
    found.goto(f"http://127.0.0.1:{served.server_port}/")
    yield found
    context.close()
    served.shutdown()
    served.server_close()
    assert not failures


def load(page, tab):
    page.get_by_role("tab", name=tab).click()
    page.get_by_role("button", name="Load the model").click()
    expect(page.get_by_label("Message" if tab == "Chat" else "Text"))


def expect(locator):
    playwright.expect(locator).to_be_enabled(timeout=60_000)


def say(page, text):
    """The tokens of the answer, once it is there."""
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")
    expect(page.get_by_role("button", name="Send"))
    answer = page.locator("#messages .assistant .text").last
    return [int(id) for id in answer.get_attribute("data-ids").split()]


# -- The same in Python ------------------------------------------------------


@functools.cache
def tokenizer(folder):
    found = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    found.no_padding()
    return found


def prompt(text):
    return f"user: {text}\nassistant: "


def greedy(site, text, adapter=None):
    """What onnxruntime in Python makes of the model that the browser has."""
    folder = site / "chat"
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    config = json.loads((folder / "genai_config.json").read_text())["model"]
    feed = {
        i.name: np.zeros(
            [1, *(s if isinstance(s, int) else 0 for s in i.shape[1:])]
            if i.name.startswith("past")
            else [s if isinstance(s, int) else 0 for s in i.shape],
            "float32",
        )
        for i in session.get_inputs()
    }
    if adapter:
        feed |= safetensors.numpy.load_file(
            folder / f"adapter-{adapter}.safetensors"
        )
    names = [
        o.name.replace("present", "past_key_values")
        for o in session.get_outputs()[1:]
    ]
    ids = tokenizer(folder).encode(prompt(text)).ids
    left, seen, found = ids, 0, []
    room = config["context_length"] - len(ids)
    ends = np.atleast_1d(config.get("eos_token_id", []))
    while len(found) < min(LIMIT, room):
        piece = left[: PIECE if seen else 1]
        left, seen = left[len(piece) :], seen + len(piece)
        feed["input_ids"] = np.array([piece])
        feed["attention_mask"] = np.ones((1, seen), "int64")
        logits, *present = session.run(None, feed)
        feed |= dict(zip(names, present, strict=True))
        if left:
            continue
        left = [int(logits[0, -1].argmax())]
        if left[0] in ends:
            break
        found += left
    return found


def shares(folder, text):
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    line = tokenizer(folder).encode(text)
    ids = np.array([line.ids], "int32")
    values = {"token_ids": ids, "padding_mask": (ids != 0).astype("int32")}
    values["segment_ids"] = np.zeros_like(ids)
    wanted = {i.name: values[i.name] for i in session.get_inputs()}
    powers = np.exp(session.run(None, wanted)[0][0].astype("float64"))
    return dict(zip(LABELS, 100 * powers / powers.sum(), strict=True))


# -- Tests -------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS[:2])
def test_the_classifier_says_what_it_says_in_python(page, site, text):
    load(page, "Classify")
    page.get_by_label("Text").fill(text)
    page.get_by_role("button", name="Classify").click()
    rows = page.get_by_role("list", name="Classes").get_by_role("listitem")
    playwright.expect(rows).to_have_count(len(LABELS))
    expected = shares(site / "classifier", text.strip())
    found = {
        row.locator(".label").inner_text(): float(
            row.locator(".share").inner_text().rstrip("%")
        )
        for row in rows.all()
    }
    assert list(found) == sorted(found, key=expected.get, reverse=True)
    for label in LABELS:
        # Half of the last digit shown, and a step of 8 bits that an input
        # next to the middle takes to the other side.
        assert abs(found[label] - expected[label]) <= 0.05 + 0.4


def test_the_model_answers_as_in_python_with_any_adapter(page, site):
    load(page, "Chat")
    plain = say(page, TEXTS[0])
    assert plain == greedy(site, TEXTS[0])
    answer = page.locator("#messages .assistant .text").last
    written = tokenizer(site / "chat").decode(plain)
    # What is not a whole letter at the end is not shown.
    assert written.rstrip("\ufffd").startswith(answer.text_content())
    page.get_by_role("button", name="New conversation").click()
    page.get_by_label("Adapter").select_option("formal")
    formal = say(page, TEXTS[0])
    assert formal == greedy(site, TEXTS[0], "formal")
    assert formal != plain


def test_an_answer_can_be_stopped(page, site):
    load(page, "Chat")
    page.get_by_label("Message").fill(TEXTS[0])
    page.get_by_role("button", name="Send").click()
    page.locator("#messages .assistant .text:not(:empty)").wait_for()
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Send"))
    answer = page.locator("#messages .assistant .text").last
    ids = [int(id) for id in answer.get_attribute("data-ids").split()]
    whole = greedy(site, TEXTS[0])
    assert 0 < len(ids) < len(whole)
    assert ids == whole[: len(ids)]


@pytest.mark.parametrize("folder", ["classifier", "chat"])
def test_texts_become_the_ids_of_the_training(page, site, folder):
    script = """async ([folder, texts]) => {
      const { makeTokenizer } = await import("/tokenizer.js");
      const file = await fetch(`${folder}/tokenizer.json`);
      const tokenizer = makeTokenizer(await file.json());
      return texts.map((text) => tokenizer.encode(text).ids);
    }"""
    found = page.evaluate(script, [folder, TEXTS])
    own = tokenizer(site / folder)
    own.no_truncation()
    assert found == [own.encode(text).ids for text in TEXTS]


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_screen(page, width):
    page.set_viewport_size({"width": width, "height": 844})
    for tab in ("Classify", "Chat"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_tabs_are_chosen_by_arrow_keys(page):
    page.get_by_role("tab", name="Classify").press("ArrowRight")
    playwright.expect(page.get_by_role("tabpanel", name="Chat")).to_be_visible()
    playwright.expect(page.get_by_role("tab", name="Chat")).to_be_focused()


def test_a_file_that_is_missing_is_named(page):
    page.route("**/chat/model.onnx?*", lambda route: route.fulfill(status=404))
    page.get_by_role("tab", name="Chat").click()
    page.get_by_role("button", name="Load the model").click()
    status = page.locator("#chat-status")
    playwright.expect(status).to_contain_text("model.onnx", timeout=60_000)
    playwright.expect(status).to_contain_text("404")


# -- Making a site -----------------------------------------------------------


def test_a_folder_of_another_kind_is_refused(chat_folder, tmp_path):
    with pytest.raises(ValueError, match="it lacks"):
        make_site.make(tmp_path / "out", classifier=chat_folder)
    with pytest.raises(ValueError, match="Received: neither"):
        make_site.make(tmp_path / "out")
    assert not (tmp_path / "out").exists()
