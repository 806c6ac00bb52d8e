"""The code that lets a decoder write, for the README of its folder."""

from collections.abc import Sequence

from keras_peft.export.result import TensorSpec

# What the code in a README writes, and room for a prompt before it.
NUM_TOKENS = 20
CACHE_LENGTH = 128


def writes_text(inputs: Sequence[TensorSpec]) -> bool:
    """Whether these are the inputs of a decoder with a cache."""
    return any(spec.name == "cache_update_index" for spec in inputs)


def code(
    inputs: Sequence[TensorSpec], prepare: Sequence[str], decode: bool
) -> list[str]:
    """Lines that write a text greedily.

    Args:
        inputs: The inputs of the file.
        prepare: Lines that make `inputs`, with the ids of a prompt.
        decode: Whether they leave a `tokenizer` that reads ids.
    """
    caches = [
        f'    "{spec.name}": np.zeros({_shape(spec)}, "{spec.dtype}"),'
        for spec in inputs
        if spec.name.startswith("cache") and spec.dtype.startswith("float")
    ]
    return [
        'model = Interpreter("model.tflite")',
        'step = model.get_signature_runner("prefill")',
        *prepare,
        f"# Room for {CACHE_LENGTH} tokens.",
        "caches = {",
        *caches,
        "}",
        'tokens, position, written = inputs["token_ids"], 0, []',
        f"for _ in range({NUM_TOKENS}):",
        '    at = np.array(position, "int32")',
        "    caches = step(token_ids=tokens, cache_update_index=at, **caches)",
        '    logits = caches.pop("logits")',
        "    position += tokens.shape[1]",
        '    tokens = logits[:, -1:].argmax(-1).astype("int32")',
        "    written.append(int(tokens[0, 0]))",
        '    step = model.get_signature_runner("decode")',
        f"print({'tokenizer.decode(written)' if decode else 'written'})",
    ]


def _shape(spec: TensorSpec) -> tuple[int, ...]:
    sizes = {"batch": 1, "cache_length": CACHE_LENGTH}
    return tuple(
        sizes[size] if isinstance(size, str) else size for size in spec.shape
    )
