"""Attention of JAX arrays, in the form that the values of a mask allow."""

import functools


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
    """Attention of JAX arrays, with the backward pass computed from them.

    What is kept for it are the inputs, of whichever form is computed: forms
    would else keep what each of them needs.
    """
    import jax

    mask = mask.astype(bool)
    attention_of_jax = functools.partial(
        jax.nn.dot_product_attention,
        scale=scale,
        implementation="cudnn" if _has_kernel(query) else "xla",
    )

    def computing(said):
        def form(query, key, value, mask):
            return attention_of_jax(query, key, value, **said(query, mask))

        return form

    def pulling(form):
        def pull(query, key, value, mask, upstream):
            masked = functools.partial(form, mask=mask)
            return jax.vjp(masked, query, key, value)[1](upstream)

        return pull

    forms = [computing(said) for said in _SAID]
    pulls = [pulling(form) for form in forms]

    @jax.custom_vjp
    def attention(*arrays):
        return jax.lax.switch(form_of(arrays[-1]), forms, *arrays)

    def forward(*arrays):
        return attention(*arrays), arrays

    def backward(arrays, upstream):
        index = form_of(arrays[-1])
        return (*jax.lax.switch(index, pulls, *arrays, upstream), None)

    attention.defvjp(forward, backward)
    return attention(query, key, value, mask)


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
