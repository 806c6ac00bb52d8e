"""Attention of JAX arrays, in the form that the values of a mask allow."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from keras_peft.replacing import replaced

# The most that may be kept beside inputs and outputs, as a share of the
# outputs: the sums of a kernel, and not the scores of all pairs of tokens.
_KEPT = 0.25


class _Masks:
    """What is asked of masks, and known of them, while a program is traced."""

    noted = None
    full = 0


@contextlib.contextmanager
def noting_forms() -> Iterator[list[Any]]:
    """Within, nothing is attended: the list gets the form of each mask."""
    noted: list[Any] = []
    with replaced(_Masks, noted=noted):
        yield noted


def is_noting_forms() -> bool:
    """Whether forms are noted, and nothing is attended."""
    return _Masks.noted is not None


def first_masks_full(count: int) -> contextlib.AbstractContextManager[None]:
    """Within, the first masks of a program are causal, and no more."""
    return replaced(_Masks, full=count)


def may_be_causal(query, key, mask):
    """Whether a mask has the shape of a causal one."""
    batch, length = query.shape[:2]
    shapes = {(rows, 1, length, length) for rows in (1, batch)}
    return (
        mask is not None
        and tuple(mask.shape) in shapes
        and key.shape[1] == length
    )


def attend(query, key, value, mask, scale):
    """Attention of JAX arrays, differentiated form by form.

    What is kept for the backward pass are inputs, outputs and the little that
    a kernel adds to them. JAX would keep all that any of the forms needs.
    """
    import jax

    if is_noting_forms():
        _Masks.noted.append(form_of(mask.astype(bool)))
        shape = *query.shape[:-1], value.shape[-1]
        return jax.numpy.zeros(shape, query.dtype)
    attention_of_jax = functools.partial(
        jax.nn.dot_product_attention,
        scale=scale,
        implementation="cudnn" if _has_kernel(query) else "xla",
    )
    forms = [_Form(attention_of_jax, said) for said in _SAID]
    if _Masks.full:
        _Masks.full -= 1
        return forms[0](query, key, value, mask)

    @jax.custom_vjp
    def attention(*arrays):
        return jax.lax.switch(form_of(arrays[-1]), forms, *arrays)

    def forward(*arrays):
        index = form_of(arrays[-1])
        kept = [jax.eval_shape(form.forward, *arrays)[1] for form in forms]
        branches = [
            functools.partial(_forward, forms, number, kept)
            for number in range(len(forms))
        ]
        outputs, kept = jax.lax.switch(index, branches, *arrays)
        is_needed = not all(form.is_again for form in forms)
        return outputs, (index, arrays, outputs if is_needed else None, kept)

    def backward(residuals, upstream):
        index, *rest = residuals
        branches = [
            functools.partial(_backward, form, number)
            for number, form in enumerate(forms)
        ]
        return (*jax.lax.switch(index, branches, *rest, upstream), None)

    attention.defvjp(forward, backward)
    return attention(query, key, value, mask.astype(bool))


def _forward(forms, number, kept, *arrays):
    """One form's outputs, and what it keeps beside zeros for the others."""
    import jax.numpy as jnp

    kept = [[jnp.zeros(a.shape, a.dtype) for a in each] for each in kept]
    outputs, kept[number] = forms[number].forward(*arrays)
    return outputs, kept


def _backward(form, number, arrays, outputs, kept, upstream):
    return form.backward(arrays, outputs, kept[number], upstream)


class _Form:
    """Attention, told of a mask what one of `_SAID` tells."""

    def __init__(self, attention, said):
        self.attention = attention
        self.said = said

    def __call__(self, query, key, value, mask):
        return self.attention(query, key, value, **self.said(query, mask))

    def forward(self, *arrays):
        """`(outputs, arrays to keep)` beside inputs and outputs."""
        import jax

        outputs, pull = self._pulled(arrays)
        leaves, self.structure = jax.tree.flatten(pull)
        known = [*arrays, outputs]
        self.places = [_place(leaf, known) for leaf in leaves]
        places = zip(leaves, self.places, strict=True)
        kept = [leaf for leaf, place in places if place is None]
        self.is_again = sum(a.nbytes for a in kept) > _KEPT * outputs.nbytes
        return outputs, [] if self.is_again else kept

    def backward(self, arrays, outputs, kept, upstream):
        import jax

        if self.is_again:
            return self._pulled(arrays)[1](upstream)
        known, kept = [*arrays, outputs], iter(kept)
        leaves = [
            next(kept) if place is None else known[place]
            for place in self.places
        ]
        return jax.tree.unflatten(self.structure, leaves)(upstream)

    def _pulled(self, arrays):
        import jax

        *arrays, mask = arrays
        return jax.vjp(functools.partial(self, mask=mask), *arrays)


def _place(array, arrays):
    """Where `array` itself is among others, or `None`."""
    places = (i for i, other in enumerate(arrays) if other is array)
    return next(places, None)


def is_on_gpu() -> bool:
    """Whether JAX computes on a GPU."""
    import jax

    return jax.default_backend() == "gpu"


def _has_kernel(query):
    """Whether cuDNN's kernel is there, and takes such arrays."""
    size = query.shape[-1]
    is_half = str(query.dtype) in ("float16", "bfloat16")
    return is_on_gpu() and is_half and size % 8 == 0 and size <= 128


def form_of(mask):
    """Which of the forms computes what `mask` says: the first that does."""
    import jax.numpy as jnp

    length = mask.shape[-1]
    lengths = _lengths(mask)
    keys, queries = jnp.arange(length), jnp.arange(length)[:, None]
    padded = (keys <= queries) & (keys < lengths[:, None, None])
    is_causal = jnp.all(mask[:, 0] == padded) & jnp.all(lengths > 0)
    is_full = jnp.all(lengths == length)
    return jnp.where(is_causal, jnp.where(is_full, 0, 1), 2)


def _lengths(mask):
    """Keys that the last query of each row may see."""
    return mask[:, 0, -1].sum(axis=-1, dtype="int32")


# What each form tells the kernel of a mask, as arguments of
# `jax.nn.dot_product_attention`.


def _full(query, mask):
    return {"is_causal": True}


def _padded(query, mask):
    import jax.numpy as jnp

    rows, length = query.shape[:2]
    lengths = jnp.broadcast_to(_lengths(mask), (rows,))
    return {
        "is_causal": True,
        "query_seq_lengths": jnp.full_like(lengths, length),
        "key_value_seq_lengths": lengths,
    }


def _masked(query, mask):
    return {"mask": mask}


_SAID = _full, _padded, _masked
