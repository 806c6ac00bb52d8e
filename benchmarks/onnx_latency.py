"""Latency of ONNX files on a processor: ours against Hugging Face's.

For every family, one random checkpoint in Hugging Face's format is read by
`transformers` and by keras-hub, exported by both, and run in turn in one
process, so that a busy machine slows both alike. A ratio is the median over
rounds of `ours / theirs`.

A single thread is timed by its own clock, which neighbors do not stop.

The peer is the faster of the stock recipes, chosen on one sequence of 128:
`torch.onnx.export(dynamo=True)` as it comes, and after
`onnxruntime.transformers.optimizer`; for int8, `quantize_dynamic` with one
scale per channel on either.

Run:
    python benchmarks/onnx_latency.py
"""

import argparse
import datetime
import itertools
import logging
import os
import platform
import time
import warnings
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import keras_hub
import numpy as np
import onnx
import onnxruntime
import torch
import transformers
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.transformers import optimizer
from runs.sessions import open_session

from keras_peft.export.build import build_onnx

LAYERS, WIDTH, HEADS, INNER, VOCABULARY = 6, 768, 12, 3072, 8192
BATCHES = 1, 8
ENCODER = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
}
# keras-hub computes BERT's GELU by tanh whatever the checkpoint says.
CONFIGS = {
    "bert": transformers.BertConfig(**ENCODER, hidden_act="gelu_pytorch_tanh"),
    "roberta": transformers.RobertaConfig(
        **ENCODER,
        max_position_embeddings=514,
        layer_norm_eps=1e-5,
        type_vocab_size=1,
    ),
    "distilbert": transformers.DistilBertConfig(
        vocab_size=VOCABULARY, n_layers=LAYERS, dim=WIDTH, n_heads=HEADS
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCABULARY, n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS
    ),
    "llama": transformers.LlamaConfig(
        **{**ENCODER, "intermediate_size": 2048},
        num_key_value_heads=4,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
    ),
    "vit": transformers.ViTConfig(
        **{k: v for k, v in ENCODER.items() if k != "vocab_size"},
        image_size=224,
        layer_norm_eps=1e-6,
    ),
}
BACKBONES = {
    "bert": keras_hub.models.BertBackbone,
    "roberta": keras_hub.models.RobertaBackbone,
    "distilbert": keras_hub.models.DistilBertBackbone,
    "gpt2": keras_hub.models.GPT2Backbone,
    "llama": keras_hub.models.Llama3Backbone,
    "vit": keras_hub.models.ViTBackbone,
}
HEADED = {
    "bert": transformers.BertForPreTraining,
    "roberta": transformers.RobertaForMaskedLM,
    "distilbert": transformers.DistilBertForMaskedLM,
    "gpt2": transformers.GPT2LMHeadModel,
    "llama": transformers.LlamaForCausalLM,
    "vit": transformers.ViTForImageClassification,
}
# The optimizer has no ViT or Llama that knows today's exporter better.
FUSIONS = {"vit": "vit", "gpt2": "gpt2"}
OURS = {
    "token_ids": "ids",
    "input_ids": "ids",
    "padding_mask": "ones",
    "attention_mask": "ones",
    "segment_ids": "zeros",
    "token_type_ids": "zeros",
    "images": "images",
    "pixel_values": "pixels",
}


class Peer(torch.nn.Module):
    """A transformers model with plain tensors in, hidden states out."""

    def __init__(self, folder, names):
        super().__init__()
        self.model = transformers.AutoModel.from_pretrained(folder).eval()
        self.names = names

    def forward(self, *tensors):
        named = dict(zip(self.names, tensors, strict=True))
        if hasattr(self.model.config, "use_cache"):
            named["use_cache"] = False
        return self.model(**named).last_hidden_state


def peer_inputs(family):
    if family == "vit":
        return {"pixel_values": torch.zeros((2, 3, 224, 224))}
    ids = torch.ones((2, 11), dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "bert":
        inputs["token_type_ids"] = ids * 0
    return inputs


def make_checkpoint(family, folder):
    torch.manual_seed(0)
    # keras-hub looks for the prefixes that a model with a head has.
    model = HEADED[family](CONFIGS[family])
    with torch.no_grad():
        for parameter in model.parameters():
            # Fresh biases are 0 and norm scales 1, which graphs would drop.
            parameter.add_(0.02 * torch.randn_like(parameter))
        if family == "roberta":
            # keras-hub has no counterpart of RoBERTa's one segment.
            model.roberta.embeddings.token_type_embeddings.weight.zero_()
    model.save_pretrained(folder)


def export_peer(family, checkpoint, path):
    inputs = peer_inputs(family)
    axes = {0: torch.export.Dim("batch")}
    if family != "vit":
        axes[1] = torch.export.Dim("sequence", max=512)
    program = torch.onnx.export(
        Peer(checkpoint, list(inputs)),
        tuple(inputs.values()),
        dynamo=True,
        dynamic_shapes={"tensors": tuple(axes for _ in inputs)},
        input_names=list(inputs),
        output_names=["hidden"],
        verbose=False,
    )
    program.save(str(path), external_data=False)


def make_files(family, folder):
    """Every file of the family that is not there yet."""
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        make_checkpoint(family, checkpoint)
    plain, fused = folder / "peer-plain.onnx", folder / "peer-fused.onnx"
    if not plain.exists():
        with torch.no_grad():
            export_peer(family, checkpoint, plain)
    if not fused.exists():
        optimizer.optimize_model(
            str(plain),
            model_type=FUSIONS.get(family, "bert"),
            num_heads=HEADS,
            hidden_size=WIDTH,
        ).save_model_to_file(str(fused))
    for path in (plain, fused):
        target = path.with_stem(path.stem + "-int8")
        if not target.exists():
            quantize_dynamic(
                path,
                target,
                per_channel=True,
                extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
            )
    if not (folder / "ours-int8.onnx").exists():
        make_ours(BACKBONES[family].from_preset(str(checkpoint)), folder)


def make_ours(backbone, folder):
    result = build_onnx(backbone, quantize="int8")
    onnx.save(result.float_model, folder / "ours.onnx")
    onnx.save(result.model, folder / "ours-int8.onnx")


def feed(session, values):
    types = {i.name: i.type[len("tensor(") : -1] for i in session.get_inputs()}
    return {
        name: values[OURS[name]].astype(type_.replace("float", "float32"))
        for name, type_ in types.items()
    }


def make_values(family, batch, length):
    rng = np.random.default_rng(0)
    if family == "vit":
        images = rng.normal(size=(batch, 224, 224, 3))
        return {"images": images, "pixels": images.transpose(0, 3, 1, 2)}
    ids = rng.integers(5, VOCABULARY, (batch, length))
    return {"ids": ids, "ones": np.ones_like(ids), "zeros": np.zeros_like(ids)}


def hidden(session, values):
    outputs = session.run(None, feed(session, values))
    return next(output for output in outputs if output.ndim == 3)


def cosine(a, b):
    a, b = a.ravel().astype("float64"), b.ravel().astype("float64")
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def check(family, folder):
    """Int8 cosines by file, once all float files give the same."""
    values = make_values(family, 2, 40)
    outputs = {
        path.stem: hidden(open_session(path, 1), values)
        for path in folder.glob("*.onnx")
    }
    exact = outputs["ours"]
    for name in ("peer-plain", "peer-fused"):
        error = np.abs(outputs[name] - exact).max() / np.abs(exact).max()
        if error > 1e-3:  # Fused activations are approximations.
            raise ValueError(f"{family}: {name} is off by {error:.2g}")
    return {
        name: cosine(output, exact)
        for name, output in outputs.items()
        if name.endswith("int8")
    }


def measure(sessions, values, threads, seconds, least=3):
    """Seconds per round and session: in turn, and the first one in turn."""
    # One thread computes in the caller, whose own time no neighbor takes.
    clock = time.thread_time if threads == 1 else time.perf_counter
    feeds = [feed(session, values) for session in sessions]
    rows, start = [], time.perf_counter()
    while len(rows) <= least or time.perf_counter() - start < seconds:
        row = np.zeros(len(sessions))
        for column in np.roll(np.arange(len(sessions)), len(rows)):
            begin = clock()
            sessions[column].run(None, feeds[column])
            row[column] = clock() - begin
        rows.append(row)
    return np.array(rows[1:])


def fastest_peer(family, folder, suffix, seconds):
    names = [f"peer-plain{suffix}", f"peer-fused{suffix}"]
    sessions = [open_session(folder / f"{n}.onnx", 1) for n in names]
    values = make_values(family, 1, 128)
    times = np.median(measure(sessions, values, 1, seconds), axis=0)
    return names[int(np.argmin(times))]


def compare(family, paths, threads, lengths, seconds):
    """Both medians and the ratio for every shape."""
    sessions = [open_session(path, threads) for path in paths]
    lengths = (196,) if family == "vit" else lengths
    cells = {}
    for shape in itertools.product(BATCHES, lengths):
        times = measure(sessions, make_values(family, *shape), threads, seconds)
        ours, theirs = np.median(times, axis=0) * 1e3
        ratio = np.median(times[:, 0] / times[:, 1])
        cells[shape] = ours, theirs, ratio
        print(
            f"{paths[0].parent.name}, {paths[1].stem}, {threads} threads, "
            f"shape {shape}: ours {ours:.1f} ms, theirs {theirs:.1f} ms, "
            f"ratio {ratio:.3f}, {len(times)} rounds",
            flush=True,
        )
    return cells


def row(family, folder, suffix, threads, lengths, seconds, cosines):
    peer = fastest_peer(family, folder, suffix, seconds)
    paths = [folder / f"{name}.onnx" for name in (f"ours{suffix}", peer)]
    cells = compare(family, paths, threads, lengths, seconds)
    ratios = [ratio for *_, ratio in cells.values()]
    ours, theirs, _ = cells[1, 196 if family == "vit" else 128]
    quality = "1 / 1"
    if suffix:
        quality = f"{cosines['ours-int8']:.5f} / {cosines[peer]:.5f}"
    return (
        f"| {family} | {'int8' if suffix else 'float32'} | {threads} "
        f"| **{np.median(ratios):.3f}** "
        f"| {min(ratios):.3f} to {max(ratios):.3f} "
        f"| {ours:.1f} / {theirs:.1f} | {quality} "
        f"| {peer.removeprefix('peer-').removesuffix('-int8')} |"
    )


def machine():
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
    packages = onnxruntime, torch, transformers, keras, keras_hub
    versions = ", ".join(f"{p.__name__} {p.__version__}" for p in packages)
    today = datetime.date.today()
    return f"{model}, {os.cpu_count()} cores; {versions}; {today}"


HEADER = """\
| family | numbers | threads | ours / theirs | over shapes \
| ms, ours / theirs | int8 cosine, ours / theirs | their recipe |
|---|---|---|---|---|---|---|---|"""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".cache/latency"))
    parser.add_argument("--families", nargs="+", default=list(CONFIGS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[32, 128, 512]
    )
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    rows = []
    for family in options.families:
        folder = options.folder / family
        folder.mkdir(parents=True, exist_ok=True)
        make_files(family, folder)
        cosines = check(family, folder)
        for suffix, threads in itertools.product(
            ("", "-int8"), options.threads
        ):
            settings = suffix, threads, options.lengths, options.seconds
            rows.append(row(family, folder, *settings, cosines))
    print(f"\n{machine()}\n\n{HEADER}", *rows, sep="\n")


if __name__ == "__main__":
    main()
