"""Rows of `benchmarks/train_gpu.py` in PEFT and transformers."""

import time

import peft
import torch
import transformers
from runs.alone import device
from runs.steps import TIMED
from runs.steps import seconds_per_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROJECTIONS = [
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
]


def measure(
    path,
    rows,
    length,
    vocabulary,
    checkpoint=False,
    compile=False,
    **shape,
):
    """`{"step": seconds, "first_step": seconds, "peak_gib": ...}`."""
    losses = []
    with device(path):
        model = build(vocabulary, checkpoint, **shape)
        learned = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            learned, lr=1e-4, weight_decay=0.01, fused=DEVICE == "cuda"
        )
        forward = torch.compile(model) if compile else model
        torch.manual_seed(0)
        tokens = torch.randint(0, vocabulary, (4, rows, length)).to(DEVICE)

        def train(steps):
            for i in range(steps):
                ids = tokens[i % 4]
                # What `transformers.Trainer(bf16=True)` does.
                with torch.autocast(DEVICE, torch.bfloat16):
                    loss = forward(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())

        start = time.perf_counter()
        train(1)
        first = time.perf_counter() - start
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    # A plain loop has no beginning whose time is to be spread over steps.
    times = seconds_per_step(path, train, TIMED // 2)
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
    return dict(
        step=min(times),
        steps=times,
        first_step=first,
        peak_gib=peak / 2**30,
        losses=losses,
        trainable=sum(p.numel() for p in learned),
    )


def build(
    vocabulary,
    checkpoint,
    layers,
    heads,
    key_heads,
    hidden,
    inner,
    rank,
    base=None,
):
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=hidden // heads,
        hidden_size=hidden,
        intermediate_size=inner,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = transformers.LlamaForCausalLM._from_config(
            config, dtype=torch.bfloat16
        )
    if base:
        quantize(model, base)
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=PROJECTIONS,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, settings)
    model.train()
    if checkpoint:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        model.enable_input_require_grads()
    return model


def quantize(model, base):
    """Kernels in the 4 bits of bitsandbytes, their scales quantized too."""
    import bitsandbytes

    for path, layer in list(model.named_modules()):
        owner, _, name = path.rpartition(".")
        if name not in PROJECTIONS:
            continue
        packed = bitsandbytes.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type=base,
        )
        packed.weight = bitsandbytes.nn.Params4bit(
            layer.weight.data.cpu(), requires_grad=False, quant_type=base
        )
        setattr(model.get_submodule(owner), name, packed.to(DEVICE))
    model.is_loaded_in_4bit = True
