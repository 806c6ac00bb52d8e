"""Prompt tuning: learned embeddings in front of a text."""

import keras
import numpy as np
from keras import ops

from keras_peft.kernels import kernel_of
from keras_peft.methods.method import Method
from keras_peft.methods.settings import check_positive_integer
from keras_peft.methods.token_adapters import EmbeddingAdapter
from keras_peft.methods.token_adapters import InFrontOfText

_INITS = ("random", "vocabulary")


@keras.saving.register_keras_serializable(package="keras_peft")
class PromptTuning(InFrontOfText, Method):
    """Prompt tuning: `num_tokens` learned embeddings before the text's own.

    The backbone computes `f([P; E(tokens)])`, where `P` of shape
    `(num_tokens, embedding units)` is all that trains. Positions count from
    the first of them, so a text has `num_tokens` positions less; outputs come
    back without them. A pooled output which the backbone itself takes from
    its first position is that of the first learned token. In an
    encoder-decoder the prompt stands before the encoder's text, and with
    `decoder` a second one before the decoder's. Trainable parameters:
    `num_tokens * units`, or twice as many. It cannot be merged.

    The backbones of keras-hub that read nothing but text take it, alone or in
    a task; `generate()` keeps the prompt in its cache.

    - [Lester et al., 2021](https://arxiv.org/abs/2104.08691)

    Args:
        num_tokens: Positive integer. Length of the prompt; 20 to 100 is usual.
        init: How the prompt starts. `"vocabulary"`: embeddings of words drawn
            from the vocabulary. `"random"`: normal, with the deviation that
            those have. Or a list of token ids, repeated or cut to
            `num_tokens`: `model.preprocessor.tokenizer("Is this spam?")`.
        decoder: Boolean. Whether the decoder of an encoder-decoder has a
            prompt of its own, of as many tokens. Other models have none.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
    >>> keras_peft.adapt(causal_lm, keras_peft.PromptTuning(num_tokens=20))
    """

    def __init__(self, num_tokens=20, init="vocabulary", decoder=False):
        check_positive_integer("num_tokens", num_tokens, "20 to 100")
        if not isinstance(decoder, bool):
            raise ValueError(
                "`decoder` must be `True`, for a prompt before the text of "
                f"the decoder too, or `False`. Received: decoder={decoder!r}"
            )
        self.num_tokens = num_tokens
        self.init = _checked_init(init)
        self.decoder = decoder

    def shapes(self, path, layer):
        # The encoder's, and the decoder's behind them.
        count = self.num_tokens * (2 if self.decoder else 1)
        return {"prompt": (count, layer.output_dim)}

    def create(self, path, layer, name, tokens):
        return PromptAdapter(self, path, layer, name, tokens)


def _checked_init(init):
    if isinstance(init, str) and init in _INITS:
        return init
    if not isinstance(init, str):
        ids = np.asarray(ops.convert_to_numpy(init))
        if ids.ndim == 1 and ids.size and ids.dtype.kind in "iu":
            return ids.tolist()
    raise ValueError(
        f"`init` must be one of {', '.join(map(repr, _INITS))}, or a "
        "non-empty list of token ids, such as a tokenizer returns. "
        f"Received: init={init!r}"
    )


class PromptAdapter(EmbeddingAdapter):
    """The prompt, at the token embedding."""

    def __init__(self, method, path, layer, name, tokens):
        self.init = method.init
        self.embedding = kernel_of(layer)
        super().__init__(layer, method.shapes(path, layer), name, tokens)

    def initialize(self, rng):
        self.prompt.assign(self._start_values(rng).astype("float32"))

    def _start_values(self, rng):
        vocabulary, units = self._table().shape
        count = self.prompt.shape[0]
        if self.init == "random":
            words = self._words(rng.integers(0, vocabulary, 1000))
            return rng.normal(scale=words.std(), size=(count, units))
        if self.init == "vocabulary":
            twice = count > vocabulary
            return self._words(rng.choice(vocabulary, count, replace=twice))
        if not 0 <= min(self.init) <= max(self.init) < vocabulary:
            raise ValueError(
                "`init` must hold token ids of the model, which are below "
                f"{vocabulary}. Received: init={self.init}"
            )
        # The same words before either text.
        ids = np.resize(self.init, self.tokens.num_tokens)
        return self._words(np.resize(ids, count))

    def _table(self):
        return self.embedding.variable

    def _words(self, ids):
        rows = ops.take(self._table(), ids, axis=0)
        return ops.convert_to_numpy(ops.cast(rows, "float32"))

    def embeddings(self):
        return ops.convert_to_tensor(self.prompt)
