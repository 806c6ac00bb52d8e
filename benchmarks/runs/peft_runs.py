"""The runs of `benchmarks/methods.py` with Hugging Face PEFT."""

import time

import numpy as np
import peft
import peft.optimizers
import torch
import transformers
from runs.data import BATCH
from runs.data import EPOCHS
from runs.data import EPSILON
from runs.data import load

LINEAR = {
    "sentiment": r".*\.(query|key|value|attention\.output\.dense"
    r"|intermediate\.dense|\d+\.output\.dense)",
    "dialogue": r".*\.(q|k|v|o|gate|up|down)_proj",
}
KEYS = {
    "sentiment": (
        r".*\.(key|value|\d+\.output\.dense)",
        r".*\d+\.output\.dense",
    ),
    "dialogue": (r".*\.(k|v|down)_proj", r".*down_proj"),
}
NORMS = {"sentiment": r".*LayerNorm", "dialogue": r".*layernorm|.*model\.norm"}
torch.set_float32_matmul_precision("high")  # As JAX has it there.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def settings(name, task, steps):
    """PEFT's settings of a method, as in its paper; `None` if it has none."""
    linear = LINEAR[task]

    def lora(**more):
        more = {"lora_alpha": 8, **more}
        return peft.LoraConfig(r=8, target_modules=linear, **more)

    def of(kind, **more):
        return getattr(peft, kind)(target_modules=linear, **more)

    kind = "CAUSAL_LM" if task == "dialogue" else "FEATURE_EXTRACTION"
    prompt = dict(task_type=kind, num_virtual_tokens=20)
    keys, forward = KEYS[task]
    made = {
        "LoRA": lambda: lora(),
        "rsLoRA": lambda: lora(use_rslora=True),
        "DoRA": lambda: lora(use_dora=True),
        "PiSSA": lambda: lora(init_lora_weights="pissa"),
        "OLoRA": lambda: lora(init_lora_weights="olora"),
        "LoRA+": lambda: lora(),
        "LoRA-FA": lambda: lora(),
        "AdaLoRA": lambda: of("AdaLoraConfig", total_step=steps, lora_alpha=8),
        "LoHa": lambda: of("LoHaConfig", r=8, alpha=8),
        "LoKr": lambda: of("LoKrConfig", r=8, alpha=8),
        "VeRA": lambda: of("VeraConfig", r=256),
        "MiSS": lambda: of("MissConfig"),
        "SHiRA": lambda: of("ShiraConfig"),
        "OFT": lambda: of("OFTConfig"),
        "BOFT": lambda: of("BOFTConfig"),
        "HRA": lambda: of("HRAConfig"),
        "RoAd": lambda: of("RoadConfig"),
        "IA3": lambda: peft.IA3Config(
            target_modules=keys, feedforward_modules=forward
        ),
        "NormTuning": lambda: peft.LNTuningConfig(target_modules=NORMS[task]),
        "PromptTuning": lambda: peft.PromptTuningConfig(
            prompt_tuning_init="SAMPLE_VOCAB", **prompt
        ),
        "PTuning": lambda: peft.PromptEncoderConfig(**prompt),
        "PrefixTuning": lambda: peft.PrefixTuningConfig(**prompt),
    }.get(name)
    return made() if made else None


class Classifier(torch.nn.Module):
    """The head of `examples/finetune_sentiment.py`."""

    def __init__(self, base, hidden):
        super().__init__()
        self.base = base
        self.dropout = torch.nn.Dropout(0.1)
        self.logits = torch.nn.Linear(hidden, 2)

    def forward(self, input_ids, attention_mask):
        hidden = self.base(input_ids=input_ids, attention_mask=attention_mask)
        hidden = hidden.last_hidden_state[:, -input_ids.shape[1] :]
        mask = attention_mask[..., None].to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        return self.logits(self.dropout(pooled))


class Runner:
    """The same as `keras_peft_runs.Runner`, with the same arguments."""

    def __init__(self, task, preset, name, kind, settings_):
        self.task, self.preset, self.name = task, preset, name
        self.data = {
            split: {
                key: None if value is None else torch.tensor(value).to(DEVICE)
                for key, value in arrays.items()
            }
            for split, arrays in load(task, preset).items()
        }
        rows = len(self.data["train"]["tokens"])
        self.steps = EPOCHS[task] * -(-rows // BATCH[task])
        self.available = settings(name, task, self.steps) is not None

    def run(self, rate, seed):
        torch.manual_seed(seed)
        np.random.seed(seed)
        model = self._model()
        start = time.perf_counter()
        self._fit(model, rate)
        seconds = time.perf_counter() - start
        trained = [p.numel() for p in model.parameters() if p.requires_grad]
        return dict(
            score=self._score(model),
            parameters=sum(trained),
            bytes=4 * sum(trained),
            merges=True,
            seconds=seconds,
        )

    def time(self, rate, alone):
        torch.manual_seed(0)
        model = self._model()
        times = []
        with alone():
            for _ in range(3):
                _wait()
                start = time.perf_counter()
                self._fit(model, rate, steps=30)
                _wait()
                times.append(time.perf_counter() - start)
        return {"step_ms": 1000 * min(times) / 30}

    def _model(self):
        found = settings(self.name, self.task, self.steps)
        kind, options = transformers.AutoModelForCausalLM, {}
        if self.task == "sentiment":
            # The only GELU that keras-hub's BERT knows, and its dropout.
            kind, options = (
                transformers.AutoModel,
                dict(hidden_act="gelu_pytorch_tanh", add_pooling_layer=False),
            )
        base = kind.from_pretrained(self.preset, dtype=torch.float32, **options)
        hidden = base.config.hidden_size
        model = peft.get_peft_model(base, found)
        if self.task == "sentiment":
            model = Classifier(model, hidden)
        return model.to(DEVICE)

    def _optimizer(self, model, rate):
        options = dict(lr=rate, weight_decay=0.01, eps=EPSILON)
        adapted = model.base if self.task == "sentiment" else model
        if self.name == "LoRA+":
            return peft.optimizers.create_loraplus_optimizer(
                adapted,
                torch.optim.AdamW,
                loraplus_lr_ratio=16,
                **options,
            )
        if self.name == "LoRA-FA":
            return peft.optimizers.create_lorafa_optimizer(
                adapted, r=8, lora_alpha=8, lr=rate, weight_decay=0.01
            )
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, **options)

    def _fit(self, model, rate, steps=None):
        optimizers = [self._optimizer(model, rate)]
        known = {id(p) for g in optimizers[0].param_groups for p in g["params"]}
        others = [
            p
            for p in model.parameters()
            if p.requires_grad and id(p) not in known
        ]
        if others:  # The head, where the recipe knows adapters only.
            optimizers.append(
                torch.optim.AdamW(others, rate, weight_decay=0.01, eps=EPSILON)
            )
        total = steps or self.steps
        decays = [
            torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: 1 - min(step, total) / total
            )
            for optimizer in optimizers
        ]
        data, batch = self.data["train"], BATCH[self.task]
        model.train()
        done = 0
        while done < total:
            order = torch.randperm(len(data["tokens"]), device=DEVICE)
            for rows in order.split(batch):
                if done == total:
                    break
                loss = self._loss(model, data, rows)
                if self.name == "AdaLoRA":
                    loss = loss + _distance_from_orthonormal(model)
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                if self.name == "AdaLoRA" and steps is None:
                    adapted = model.base if self.task == "sentiment" else model
                    adapted.base_model.update_and_allocate(done)
                for optimizer, decay in zip(optimizers, decays, strict=True):
                    optimizer.zero_grad()
                    decay.step()
                done += 1

    def _logits(self, model, data, rows):
        found = model(
            input_ids=data["tokens"][rows].long(),
            attention_mask=data["mask"][rows].long(),
        )
        if self.task == "sentiment":
            return found
        return found.logits[:, -data["tokens"].shape[1] :]

    def _loss(self, model, data, rows, reduction="mean"):
        logits = self._logits(model, data, rows)
        targets = data["targets"][rows].long()
        if self.task == "sentiment":
            return torch.nn.functional.cross_entropy(logits, targets)
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="none"
        )
        losses = losses * data["weights"][rows].flatten()
        return losses.mean() if reduction == "mean" else losses.sum()

    @torch.no_grad()
    def _score(self, model):
        model.eval()
        data = self.data["test"]
        chunks = torch.arange(len(data["tokens"]), device=DEVICE).split(16)
        if self.task == "sentiment":
            right = [
                (self._logits(model, data, c).argmax(-1) == data["targets"][c])
                for c in chunks
            ]
            return float(torch.cat(right).float().mean())
        total = sum(float(self._loss(model, data, c, "sum")) for c in chunks)
        return -total / float(data["weights"].sum())


def _distance_from_orthonormal(model):
    """What PEFT adds to a loss that the model itself computes of labels."""
    weight = peft.AdaLoraConfig(total_step=1).orth_reg_weight
    distances = []
    for name, matrix in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            rows = matrix if "lora_A" in name else matrix.T
            gram = rows @ rows.T
            excess = gram - torch.eye(len(gram), device=gram.device)
            distances.append(torch.linalg.norm(excess))
    return weight * torch.stack(distances).mean()


def _wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()
