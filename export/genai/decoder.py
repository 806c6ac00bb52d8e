"""What a decoder consists of, in NumPy: nothing of Keras, nothing of ONNX.

`families` describes a Keras model in these terms, `graph` makes an ONNX model
of the description. Everything is float32, and a norm's scale is what the
normalized input is multiplied with.
"""

import dataclasses
from collections.abc import Iterator
from typing import TypeVar

import numpy as np

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """`inputs @ kernel + bias`.

    Attributes:
        path: Path of the Keras layer, as `layer_tree.walk` gives it.
        kernel: `[inputs, outputs]`.
        bias: `[outputs]`, or `None`.
        columns: Which columns of the layer's own matrix these are, where one
            layer of Keras is several here; `None` for all in order.
        part: What these columns are for, such as `"query"`, in that case.
    """

    path: str
    kernel: np.ndarray
    bias: np.ndarray | None = None
    columns: np.ndarray | None = None
    part: str = ""

    @property
    def key(self) -> str:
        """What tells it from all others: by this, storage is chosen."""
        return f"{self.path}:{self.part}" if self.part else self.path


@dataclasses.dataclass(frozen=True, eq=False)
class Norm:
    """A layer norm, or with `is_rms` one that neither centers nor shifts."""

    path: str
    scale: np.ndarray
    bias: np.ndarray | None = None
    epsilon: float = 1e-5
    is_rms: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Rotary:
    """Positions as angles by which pairs of channels are turned.

    Attributes:
        frequencies: Angle per position of each pair, `[pairs]`. Channels
            beyond `2 * pairs` are left as they are.
        scale: Factor of the cosines and sines, as YaRN has it.
        interleaved: Whether a pair is `(2i, 2i + 1)` and not
            `(i, pairs + i)`.
        long: Frequencies for texts of more than `long_after` tokens, or
            `None` for the same ones.
        long_after: How many tokens `frequencies` are for in that case.
    """

    frequencies: np.ndarray
    scale: float = 1.0
    interleaved: bool = False
    long: np.ndarray | None = None
    long_after: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Attention:
    """Causal attention with as many or fewer heads of keys and values.

    Attributes:
        query: `[hidden, heads * head_size]`, heads outermost.
        key: `[hidden, kv_heads * head_size]`.
        value: Likewise.
        output: `[heads * head_size, hidden]`.
        num_heads: Heads of queries.
        num_kv_heads: Heads of keys and values.
        head_size: Channels per head.
        scale: Factor of the products of queries and keys.
        rotary: `None` where a layer turns nothing.
        query_norm: Norm of each head's query before it is turned.
        key_norm: Likewise of keys.
        window: How many keys a query sees, its own included; `None` for all.
        soft_cap: Bound `c` of `c * tanh(x / c)` on the scores.
        slopes: What a score loses per position of distance, `[heads]`
            (ALiBi).
        sinks: A score per head that takes part in the softmax and has no
            value, `[heads]`.
        channels: Which channel of the model's keys, once they are turned,
            each of a head's is here, where the orders differ.
    """

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    rotary: Rotary | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    window: int | None = None
    soft_cap: float | None = None
    slopes: np.ndarray | None = None
    sinks: np.ndarray | None = None
    channels: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class FeedForward:
    """`down(activation(up(x)))`, or `down(activation(gate(x)) * up(x))`.

    Attributes:
        up: `[hidden, inner]`.
        down: `[inner, hidden]`.
        gate: Like `up`, or `None`.
        activation: A key of `blocks.ACTIVATIONS`.
    """

    up: Linear
    down: Linear
    gate: Linear | None = None
    activation: str = "gelu"


@dataclasses.dataclass(frozen=True, eq=False)
class Experts:
    """A few of many feed-forward layers for each token.

    Attributes:
        router: `[hidden, experts]`.
        experts: The feed-forward layers, all with a gate; their activation
            is a key of `experts.ALPHAS`.
        per_token: How many serve each token.
        normalized: Whether the weights of the chosen sum to 1.
        shared: One that serves every token besides.
        shared_gate: `[hidden, 1]`, whose sigmoid `shared` is multiplied with.
        limit: Where an expert's `gate(x)` is cut off above, and its `up(x)`
            at both ends.
        offset: Added to `up(x)` before `activation(gate(x))` multiplies it.
    """

    router: Linear
    experts: tuple[FeedForward, ...]
    per_token: int
    normalized: bool = True
    shared: FeedForward | None = None
    shared_gate: Linear | None = None
    limit: float | None = None
    offset: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """An attention and a feed-forward layer around one stream.

    Attributes:
        attention: The attention.
        feed_forward: The feed-forward layer, or experts.
        attention_norm: What the attention's input passes.
        feed_forward_norm: What the other's input passes; with `is_parallel`,
            `None` stands for the output of `attention_norm`.
        attention_out_norm: What the attention's output passes before it is
            added to the stream.
        feed_forward_out_norm: Likewise.
        is_parallel: Whether both read the stream as it came into the block.
    """

    attention: Attention
    feed_forward: FeedForward | Experts
    attention_norm: Norm
    feed_forward_norm: Norm | None
    attention_out_norm: Norm | None = None
    feed_forward_out_norm: Norm | None = None
    is_parallel: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """One row per token, or per position; `path` is the Keras layer's."""

    path: str
    rows: np.ndarray

    @property
    def key(self) -> str:
        """By this, storage is chosen; a tied head shares it."""
        return self.path


@dataclasses.dataclass(frozen=True, eq=False)
class Decoder:
    """From token ids to logits.

    Attributes:
        table: `[vocabulary, hidden]`.
        blocks: The blocks, first to last.
        norm: What the last block's output passes.
        head: `[hidden, vocabulary]`, or `None` where it is the table.
        positions: `[context, hidden]`, added to the tokens' rows.
        embedding_scale: Factor of the tokens' rows.
        embedding_norm: What the sum of both passes.
        soft_cap: Bound on the logits, as in `Attention`.
        context_length: How many tokens the model was made for, where the
            Keras model tells.
        genai_type: `model.type` in `genai_config.json`.
    """

    table: Table
    blocks: tuple[Block, ...]
    norm: Norm
    head: Linear | None = None
    positions: Table | None = None
    embedding_scale: float = 1.0
    embedding_norm: Norm | None = None
    soft_cap: float | None = None
    context_length: int | None = None
    genai_type: str = "decoder"

    @property
    def hidden_size(self) -> int:
        """Channels of the stream."""
        return self.table.rows.shape[1]

    @property
    def vocabulary_size(self) -> int:
        """How many tokens there are."""
        return self.table.rows.shape[0]


def parts(whole: object, kind: type[T]) -> Iterator[T]:
    """Yields every part of a kind, such as each `Linear`, in order."""
    if isinstance(whole, kind):
        yield whole
    elif isinstance(whole, tuple):
        for part in whole:
            yield from parts(part, kind)
    elif dataclasses.is_dataclass(whole):
        for field in dataclasses.fields(whole):
            yield from parts(getattr(whole, field.name), kind)
