"""How fast forms of a language model are in headless Chromium.

python examples/browser/measure.py TEXT FOLDER [FOLDER ...]

Each folder is one of `to_genai`. It is measured as it is, and the first, which
should be in float32, also as `make_site.py` rewrites it. What a form loses is
the mean negative log-likelihood of tokens of TEXT, less that of the first
folder; KL is its divergence from that one. Needs `pip install playwright` and a
Chromium.
"""

import shutil
import sys
import tempfile
import threading
from pathlib import Path

import make_site
import numpy as np
import onnxruntime
import tokenizers
from playwright.sync_api import sync_playwright
from serve import server

ROUNDS, PROMPT, STEPS = 3, 64, 8
PASSAGES, LENGTH, PIECE = 3, 97, 16
LOAD = """async (entry) => {
  const { LanguageModel } = await import("/language_model.js");
  const start = performance.now();
  window.model = await LanguageModel.load(entry);
  return (performance.now() - start) / 1000;
}"""
# Tokens per second: of the prompt, and of the middle one of steps after it.
SPEED = """async ([ids, steps]) => {
  model.forget();
  const times = [performance.now()];
  model.config.eos_token_id = [];
  for await (const { id } of model.generate(ids, { limit: steps }))
    if (id !== undefined) times.push(performance.now());
  const spans = times.slice(1).map((time, at) => time - times[at]);
  const sorted = spans.slice(1).sort((a, b) => a - b);
  return [1000 * ids.length / spans[0], 1000 / sorted[sorted.length >> 1]];
}"""


def forms(folders, out):
    """`{name: entry of site.json}`."""
    made = {}
    for folder in folders:
        made[f"{folder.name} as exported"] = (folder, None)
    made["int8, inputs in 8 bits"] = (folders[0], 8)
    made["int8, inputs in 16 bits"] = (folders[0], 16)
    entries = {}
    for at, (name, (folder, bits)) in enumerate(made.items()):
        entries[name] = make_site.write_chat(folder, out / str(at), bits)
    return entries


def predictions(path, rows):
    """`(log-probabilities, what came)` of each token of the second halves.

    Rows are read in pieces, as in the browser.
    """
    session = onnxruntime.InferenceSession(path / "model.onnx")
    caches = [i for i in session.get_inputs() if i.name.startswith("past")]
    names = [i.name for i in caches]
    found, came = [], []
    for row in rows:
        feed = {
            i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), "float32")
            for i in caches
        }
        ends = [1, *range(1 + PIECE, LENGTH // 2 + 2, PIECE)]
        half = ends[-1]
        ends += range(half + 1, LENGTH)
        for start, end in zip([0, *ends], ends, strict=False):
            feed["input_ids"] = np.array([row[start:end]])
            feed["attention_mask"] = np.ones((1, end), "int64")
            logits, *present = session.run(None, feed)
            feed.update(zip(names, present, strict=True))
            if end >= half:
                logits = logits[0, -1] - logits[0, -1].max()
                found.append(logits - np.log(np.exp(logits).sum()))
                came.append(row[end])
    return np.array(found), np.array(came)


def speeds(entries, ids, port):
    """`{name: (seconds to load, rates of each round)}`, taking turns."""
    found, pages = {}, {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for name, entry in entries.items():
            pages[name] = browser.new_context().new_page()
            pages[name].goto(f"http://127.0.0.1:{port}/")
            found[name] = pages[name].evaluate(LOAD, entry), []
        for _ in range(ROUNDS):
            for name, page in pages.items():
                rates = page.evaluate(SPEED, [ids, STEPS])
                found[name][1].append(rates)
        browser.close()
    return found


def main(text, folders):
    with tempfile.TemporaryDirectory() as site:
        out = Path(site)
        for page in make_site.HERE.glob("*.js"):
            shutil.copy(page, out)
        (out / "index.html").write_text("<!doctype html>")
        shutil.copytree(make_site.libraries(), out / "libraries")
        entries = forms(folders, out)
        served = server(out)
        threading.Thread(target=served.serve_forever, daemon=True).start()
        tokenizer = tokenizers.Tokenizer.from_file(
            str(folders[0] / "tokenizer.json")
        )
        ids = tokenizer.encode(text).ids
        rows = np.array(ids[: PASSAGES * LENGTH]).reshape(PASSAGES, LENGTH)
        measured = speeds(entries, ids[:PROMPT], served.server_port)
        print("| form | MB | prompt tokens/s | answer tokens/s | loss | KL |")
        print("|---|---|---|---|---|---|")
        base = None
        for name, (seconds, rates) in measured.items():
            files = entries[name]["files"].values()
            size = sum(file["bytes"] for file in files) / 1e6
            found, came = predictions(out / entries[name]["folder"], rows)
            base = found if base is None else base
            lost = (base - found)[np.arange(len(came)), came]
            error = lost.std() / len(lost) ** 0.5
            divergence = (np.exp(base) * (base - found)).sum(1).mean()
            prompt, answer = np.median(rates, axis=0)
            print(
                f"| {name}, loaded in {seconds:.1f} s | {size:.0f} "
                f"| {prompt:.0f} | {answer:.1f} "
                f"| {lost.mean():+.3f} ± {error:.3f} | {divergence:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]).read_text("utf-8"), [Path(p) for p in sys.argv[2:]])
