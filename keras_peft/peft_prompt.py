"""Prompt tuning in PEFT's files: the embeddings in front of a text."""

import numpy as np

from keras_peft.methods.prompt_tuning import PromptTuning
from keras_peft.targets import Candidates
from keras_peft.targets import find_head

PEFT_TYPE = "PROMPT_TUNING"
METHOD = PromptTuning
SUFFIXES = ()
KEY = "prompt_embeddings"
SHARED = (KEY,)
# Sizes of the base, and how the prompt started.
KNOWN = (
    *("num_virtual_tokens", "token_dim", "num_transformer_submodules"),
    *("num_attention_heads", "num_layers", "modules_to_save"),
    *("prompt_tuning_init", "prompt_tuning_init_text"),
    *("tokenizer_name_or_path", "tokenizer_kwargs"),
)


def read(reader):
    """`(method, {path: {weight: array}})`; notes what is wrong."""
    count, against = count_of(reader), objection(reader.names)
    if count is None or against:
        reader.wrong += [against] if against else []
        return None
    method = PromptTuning(num_tokens=count)
    adapters = find(reader.names, method)
    path = next(path for path, shapes in adapters.items() if shapes)
    rows, units = adapters[path]["prompt"]
    # An encoder-decoder's file may hold a second prompt, which PEFT never
    # puts before the text of the decoder.
    rows *= reader.config.get("num_transformer_submodules") or 1
    prompt = reader.take_shared(KEY, (rows, units))
    if prompt is None:
        return None
    found = {path: {} for path in adapters}
    found[path]["prompt"] = prompt[:count] / scale(reader.names)
    return method, found


def count_of(reader):
    """The number of tokens in front; notes if that is none."""
    count = reader.config.get("num_virtual_tokens")
    if not isinstance(count, int) or count < 1:
        reader.wrong.append(f"num_virtual_tokens={count!r} is no count")
        return None
    return count


def objection(names):
    """Why a prompt means something else in PEFT, or `None`."""
    if len(names.heads) > 1:
        return (
            "this classifier reads the first word, and in PEFT the first "
            "token of the prompt"
        )
    return None


def find(names, method):
    """`{path: shapes}` of the layers that a method finds itself."""
    head = find_head(names.model)
    candidates = Candidates(names.model, head, method.accepts)
    paths = method.default_targets(candidates)
    return method.all_shapes({path: names.layers[path] for path in paths})


def scale(names):
    """What transformers 5 multiplies embeddings by before PEFT sees them.

    There the prompt stands beside scaled embeddings, here beside those that
    the backbone is about to scale.
    """
    if names.family not in ("gemma", "gemma3"):
        return np.float32(1.0)
    return np.float32(np.sqrt(names.backbone.hidden_dim))


def write(writer):
    """`(settings, {})`; notes what cannot be said."""
    against = objection(writer.names)
    if writer.method.decoder:
        against = "PEFT puts no prompt before the text of a decoder"
    if against:
        writer.wrong.append(against)
        return None
    leaf = next(leaf for leaf in writer.leaves.values() if leaf.kept)
    path = next(p for p, other in writer.leaves.items() if other is leaf)
    prompt = writer.weights(path)["prompt"]
    writer.shared[KEY] = prompt * scale(writer.names)
    settings = {
        "task_type": writer.names.task or "FEATURE_EXTRACTION",
        "num_virtual_tokens": len(prompt),
        # PEFT takes an encoder-decoder to have two prompts otherwise.
        "num_transformer_submodules": 1,
        "token_dim": prompt.shape[1],
    }
    return settings, {}
