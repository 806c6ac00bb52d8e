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
    implementation = "cudnn" if _has_kernel(query) else "xla"

    def form(index):
        return functools.partial(_FORMS[index], scale, implementation)

    def gradients(index):
        def pull(query, key, value, mask, upstream):
            def forward(*arrays):
                return form(index)(*arrays, mask)

            return jax.vjp(forward, query, key, value)[1](upstream)

        return pull

    @jax.custom_vjp
    def attention(query, key, value, mask):
        forms = [form(index) for index in range(len(_FORMS))]
        return jax.lax.switch(form_of(mask), forms, query, key, value, mask)

    def forward(query, key, value, mask):
        return attention(query, key, value, mask), (query, key, value, mask)

    def backward(saved, upstream):
        pulls = [gradients(index) for index in range(len(_FORMS))]
        found = jax.lax.switch(form_of(saved[3]), pulls, *saved, upstream)
        return (*found, None)

    attention.defvjp(forward, backward)
    return attention(query, key, value, mask)


def _has_kernel(query):
    """Whether cuDNN's kernel is there, and takes such arrays."""
    import jax

    size = query.shape[-1]
    is_half = str(query.dtype) in ("float16", "bfloat16")
    is_gpu = jax.default_backend() == "gpu"
    return is_gpu and is_half and size % 8 == 0 and size <= 128


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


def _full(scale, implementation, query, key, value, mask):
    import jax

    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        scale=scale,
        is_causal=True,
        implementation=implementation,
    )


def _padded(scale, implementation, query, key, value, mask):
    import jax
    import jax.numpy as jnp

    lengths = jnp.broadcast_to(_lengths(mask), query.shape[:1])
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        scale=scale,
        is_causal=True,
        query_seq_lengths=jnp.full_like(lengths, query.shape[1]),
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )


def _masked(scale, implementation, query, key, value, mask):
    import jax

    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        scale=scale,
        implementation=implementation,
    )


_FORMS = _full, _padded, _masked
