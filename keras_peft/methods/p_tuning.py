"""P-tuning: a prompt that a small network writes."""

import math

import keras
from keras import ops

from keras_peft.methods.method import Method
from keras_peft.methods.settings import check_positive_integer
from keras_peft.methods.token_adapters import EmbeddingAdapter
from keras_peft.methods.token_adapters import InFrontOfText

_ENCODERS = ("mlp", "lstm")
_WAYS = ("forward", "backward")


@keras.saving.register_keras_serializable(package="keras_peft")
class PTuning(InFrontOfText, Method):
    """P-tuning: prompt tuning whose prompt a small network computes.

    `P = network(X)` with learned inputs `X` of shape `(num_tokens, units)`
    stands before the text's embeddings. The network ties the prompt's tokens
    together while they train. It is part of the adapter and of its files. All
    else is as in `PromptTuning`.

    - `encoder="mlp"`: `relu(relu(X @ A + a) @ B + b) @ C + c`, each token for
      itself. With `h = hidden_dim`, it trains
      `(num_tokens + 2 * h + 1) * units + h * (h + 2)` parameters.
    - `encoder="lstm"`: `relu(Y @ A + a) @ B + b`, where `Y` comes from an LSTM
      of `h` units that reads `X` and one that reads it backward. It trains
      `(num_tokens + 10 * h + 1) * units + 2 * h * (6 * h + 5)` parameters.

    - [Liu et al., 2021](https://arxiv.org/abs/2103.10385)

    Args:
        num_tokens: Positive integer. Length of the prompt.
        hidden_dim: Positive integer, width of the network; `None` takes the
            units of the token embedding.
        encoder: `"mlp"` or `"lstm"`.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
    >>> keras_peft.adapt(classifier, keras_peft.PTuning(num_tokens=20))
    """

    def __init__(self, num_tokens=20, hidden_dim=None, encoder="mlp"):
        check_positive_integer("num_tokens", num_tokens, "20 to 100")
        if hidden_dim is not None:
            check_positive_integer("hidden_dim", hidden_dim, "128 to 1024")
        if encoder not in _ENCODERS:
            raise ValueError(
                f"`encoder` must be one of {', '.join(map(repr, _ENCODERS))}. "
                f"Received: encoder={encoder!r}"
            )
        self.num_tokens = num_tokens
        self.hidden_dim = hidden_dim
        self.encoder = encoder

    def shapes(self, path, layer):
        units = layer.output_dim
        hidden = units if self.hidden_dim is None else self.hidden_dim
        shapes = {"prompt_inputs": (self.num_tokens, units)}
        sizes = (units, hidden, hidden, units)
        if self.encoder == "lstm":
            sizes = (2 * hidden, 2 * hidden, units)
            for way in _WAYS:
                # Gates lie side by side: input, forget, candidate, output.
                shapes[f"{way}_kernel"] = (units, 4 * hidden)
                shapes[f"{way}_recurrent"] = (hidden, 4 * hidden)
                shapes[f"{way}_bias"] = (4 * hidden,)
        for i, size in enumerate(sizes[1:]):
            shapes[f"dense_{i}_kernel"] = (sizes[i], size)
            shapes[f"dense_{i}_bias"] = (size,)
        return shapes

    def create(self, path, layer, name, tokens):
        return PTuningAdapter(self, path, layer, name, tokens)


class PTuningAdapter(EmbeddingAdapter):
    """The network that writes the prompt, at the token embedding."""

    def __init__(self, method, path, layer, name, tokens):
        self.recurrent = method.encoder == "lstm"
        self.num_dense = 2 if self.recurrent else 3
        super().__init__(layer, method.shapes(path, layer), name, tokens)

    def initialize(self, rng):
        for key, variable in self.parameters.items():
            if key == "prompt_inputs":
                value = rng.normal(size=variable.shape)
            elif key.endswith("_bias"):
                continue
            else:
                bound = 1 / math.sqrt(variable.shape[0])
                value = rng.uniform(-bound, bound, size=variable.shape)
            variable.assign(value.astype("float32"))

    def embeddings(self):
        hidden = ops.convert_to_tensor(self.prompt_inputs)
        if self.recurrent:
            hidden = ops.concatenate(
                [self._lstm(hidden, way) for way in _WAYS], axis=1
            )
        for i in range(self.num_dense):
            kernel = getattr(self, f"dense_{i}_kernel")
            hidden = ops.matmul(ops.relu(hidden) if i else hidden, kernel)
            hidden = hidden + getattr(self, f"dense_{i}_bias")
        return hidden  # (num_tokens, units)

    def _lstm(self, inputs, way):
        """The hidden states of an LSTM over the tokens."""
        recurrent = getattr(self, f"{way}_recurrent")
        inputs = ops.matmul(inputs, getattr(self, f"{way}_kernel"))
        inputs = inputs + getattr(self, f"{way}_bias")

        # Hidden and cell state in one array: TensorFlow scans over one alone.
        def step(state, gates):
            hidden, cell = ops.split(state, 2)
            gates = gates + ops.matmul(hidden[None], recurrent)[0]
            enter, forget, candidate, leave = ops.split(gates, 4)
            cell = ops.sigmoid(forget) * cell
            cell = cell + ops.sigmoid(enter) * ops.tanh(candidate)
            hidden = ops.sigmoid(leave) * ops.tanh(cell)
            state = ops.concatenate([hidden, cell])
            return state, state

        units = recurrent.shape[0]
        start = ops.zeros((2 * units,), "float32")
        reverse = way == "backward"
        _, states = ops.scan(step, start, inputs, reverse=reverse)
        return states[:, :units]  # (num_tokens, hidden_dim)
