"""Virtual tokens: what prompt and prefix tuning put before a text.

Whatever tokens stand first, an adapter says what they are: their embeddings,
or their keys and values in every attention. Its rows end with one of zeros,
which stands for all other tokens; by default there is no other row.
"""

import numpy as np
import onnx_ir as ir

from keras_peft.export.genai.decoder import Attention
from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.decoder import Rotary
from keras_peft.export.genai.positions import rotary_angles
from keras_peft.export.genai.writer import Writer

PROMPT = "prompt.rows"


def prompted(
    writer: Writer, positions: ir.Value, x: ir.Value, width: int
) -> ir.Value:
    """Embeddings `x`, of which the first are those of a prompt."""
    return _replaced(writer, positions, x, PROMPT, width, "prompt")


def prefixed(
    writer: Writer,
    layer: Attention,
    positions: ir.Value,
    key: ir.Value,
    value: ir.Value,
) -> tuple[ir.Value, ir.Value]:
    """Keys and values, of which the first are those of a prefix."""
    width = layer.num_kv_heads * layer.head_size
    own_key, own_value = (
        _replaced(writer, positions, x, name, width, "prefix")
        for x, name in zip((key, value), _names(layer), strict=True)
    )
    return own_key, own_value


def _replaced(
    writer: Writer,
    positions: ir.Value,
    x: ir.Value,
    name: str,
    width: int,
    kind: str,
) -> ir.Value:
    """`x` `[batch, tokens, width]`, its first tokens taken from a default."""
    shape = (f"{kind}.tokens", width)
    rows = writer.default(name, np.zeros((1, width)), shape)

    def last() -> ir.Value:
        count = writer.op("Shape", rows, start=0, end=1)
        return writer.op("Sub", count, writer.integers(1))

    def is_virtual() -> ir.Value:
        found = writer.op(
            "Less", positions, writer.shared(f"{kind}.last", last)
        )
        return writer.op("Unsqueeze", found, writer.integers(-1))

    def index() -> ir.Value:
        return writer.op("Min", positions, writer.shared(f"{kind}.last", last))

    # All layers have a prefix of one length.
    found = writer.op("Gather", rows, writer.shared(f"{kind}.index", index))
    return writer.op("Where", writer.shared(kind, is_virtual), found, x)


def _names(layer: Attention) -> tuple[str, str]:
    return f"{layer.key.key}.prefix_keys", f"{layer.key.key}.prefix_values"


# -- Adapter files -----------------------------------------------------------


def prompt_parameters(prompt: np.ndarray) -> dict[str, np.ndarray]:
    """Embeddings `[tokens, hidden]` as an input of the graph."""
    return {PROMPT: _ended(prompt)}


def prefix_parameters(
    decoder: Decoder, prefix: np.ndarray
) -> dict[str, np.ndarray]:
    """Keys and values `[tokens, blocks, 2, heads, size]` as inputs."""
    found = {}
    for n, block in enumerate(decoder.blocks):
        layer = block.attention
        keys, values = prefix[:, n, 0], prefix[:, n, 1]
        if layer.channels is not None:
            keys = keys[..., layer.channels]
        if layer.rotary is not None:
            keys = turned_back(layer.rotary, keys)
        for name, rows in zip(_names(layer), (keys, values), strict=True):
            found[name] = _ended(rows.reshape(len(rows), -1))
    return found


def turned_back(rotary: Rotary, keys: np.ndarray) -> np.ndarray:
    """Keys `[tokens, heads, size]` that the graph's turning restores.

    The model's prefix is not turned, and the graph turns all keys by their
    positions.
    """
    if rotary.long is not None:
        raise ValueError(
            "This model turns keys by frequencies that depend on how long a "
            "text is, and a prefix is turned by none. Use prompt tuning. "
            "Received: a prefix, and long-context frequencies"
        )
    angles = rotary_angles(rotary, len(keys))[:, None]  # (tokens, 1, pairs)
    cos, sin = np.cos(angles) / rotary.scale, np.sin(angles) / rotary.scale
    pairs = angles.shape[-1]
    first, second = _pairs(rotary, pairs)
    found = keys.astype("float64")
    a, b = found[..., first].copy(), found[..., second].copy()
    found[..., first] = a * cos + b * sin
    found[..., second] = b * cos - a * sin
    return found.astype("float32")


def _pairs(rotary: Rotary, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The channels that are turned together."""
    each = np.arange(count)
    if rotary.interleaved:
        return 2 * each, 2 * each + 1
    return each, count + each


def _ended(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([rows, np.zeros_like(rows[:1])])
