"""Plain LoRA out of other things: any adapter, or a full fine-tune."""

import keras
import numpy as np

from keras_peft import adapted_model
from keras_peft import adapter_state
from keras_peft import layer_tree
from keras_peft import low_rank
from keras_peft.adapt import check_layers
from keras_peft.adapter_state import NamedAdapter
from keras_peft.combine import lora_of
from keras_peft.kernels import has_kernel
from keras_peft.kernels import kernel_of
from keras_peft.kernels import read
from keras_peft.low_rank import LowRankReport
from keras_peft.patterns import lies_in
from keras_peft.targets import find_head


def to_lora(
    model: keras.Model, name: str = "default", rank: int | float | None = None
) -> LowRankReport:
    r"""Puts a plain LoRA in the place of an adapter of any other kind.

    For wherever LoRA is all that is known: other libraries, servers,
    `combine_adapters`. The adapter's change of each kernel is decomposed,
    `U @ S @ V`, and the leading ranks become `A = U @ sqrt(S)` and
    `B = sqrt(S) @ V`; what the others hold is measured. Head, strength and
    what trains stay; the LoRA has scale 1 and no dropout.

    Args:
        model: An adapted model.
        name: Which of its adapters.
        rank: The most ranks per layer, a positive integer; or the share of
            each change's energy to keep, its squared singular values, a float
            in `(0, 1)`; or `None` for as many as the change has, up to the
            rounding of float32. Of LoRA, LoHa, MiSS or single tokens these
            are few. DoRA, IA3 and rotations change a kernel in all its ranks.

    Returns:
        A `LowRankReport` with the rank of each layer and what it misses.

    Raises:
        ValueError: if the adapter does something else than change kernels, or
            `rank` is out of its range. The model is then as it was.

    Example:
    >>> keras_peft.adapt(model, keras_peft.LoRA(rank=8, decompose=True))
    >>> model.fit(...)
    >>> report = keras_peft.to_lora(model, rank=0.99)
    """
    _check_rank(rank)
    adapter = adapter_state.named(model, name)
    changes = _kernel_changes(model, name, adapter)
    factors, report = _factorize(changes, rank)
    method = lora_of(report.ranks)
    layers = layer_tree.layers_by_path(model)
    made = {p: method.create(p, layers[p], name) for p in adapter.paths}
    for path, leaf in made.items():
        layer_tree.detach(layers[path], name)
        layer_tree.attach(layers[path], name, leaf)
    state = model.peft
    state.adapters[name] = NamedAdapter(
        method, adapter.paths, adapter.trainable
    )
    _assign(model, name, factors)
    adapted_model.activate(model, state.active)
    layer_tree.forget_compiled(model)
    return report


def extract_lora(
    base: keras.Model, tuned: keras.Model, rank: int | float
) -> LowRankReport:
    r"""Adapts `base` with the LoRA that brings it nearest to `tuned`.

    Makes an adapter of megabytes out of a full fine-tune: for each kernel, the
    best approximation of `tuned - base` of the given rank, by its singular
    value decomposition. Kernels that did not change are not adapted. The head,
    whatever stands outside the backbone, gets the values of `tuned` in full.

    LoRA changes kernels only. What else was tuned, biases and norms, stays as
    in `base`, and the report lists it as `left_out`.

    Args:
        base: The pretrained model. It is adapted in place, as `"default"`.
        tuned: A model of the same architecture, trained from it. It is left
            as it is.
        rank: The most ranks per layer, a positive integer; or the share of
            each change's energy to keep, its squared singular values, a float
            in `(0, 1)`.

    Returns:
        A `LowRankReport`: the rank of each layer, what it misses of the
        change, and what was left out.

    Raises:
        ValueError: if the two differ in their layers, or in no kernel.

    Example:
    >>> report = keras_peft.extract_lora(pretrained, fine_tuned, rank=16)
    >>> keras_peft.save_adapter(pretrained, "my-adapter/")
    """
    _check_rank(rank)
    ours, theirs = _variables(base), _variables(tuned)
    _check_pair(base, tuned, ours, theirs)
    head = find_head(base)
    changes, left_out = _differences(base, ours, theirs, head)
    factors, report = _factorize(changes, rank)
    method = lora_of(report.ranks)
    layers = layer_tree.layers_by_path(base)
    check_layers({path: layers[path] for path in changes}, method)
    adapter = NamedAdapter(method, list(changes))
    adapted_model.install(base, "default", adapter, head)
    _assign(base, "default", factors)
    below = adapter_state.variables_below(
        layer_tree.layers_by_path(tuned), head
    )
    values = zip(below, adapter_state.read(below), strict=True)
    adapter_state.set_head_values(base, "default", dict(values))
    adapted_model.activate(base, {"default": 1.0})
    return LowRankReport(report.ranks, report.residuals, left_out)


def _factorize(changes, rank):
    """`({path: (a, b)}, report)` of `{path: change of the kernel}`."""
    factors, residuals = {}, {}
    for path, change in changes.items():
        decomposition = low_rank.decompose(change)
        kept = low_rank.rank_for(decomposition[1], rank)
        a, b = factors[path] = low_rank.factors(decomposition, kept)
        missed = np.linalg.norm(change - a.astype("float64") @ b)
        size = np.linalg.norm(change)
        residuals[path] = float(missed / size) if size else 0.0
    ranks = {path: a.shape[1] for path, (a, _) in factors.items()}
    return factors, LowRankReport(ranks, residuals)


def _assign(model, name, factors):
    for path, leaf in adapter_state.leaves(model, name).items():
        leaf.lora_kernel_a.assign(factors[path][0])
        leaf.lora_kernel_b.assign(factors[path][1])


def _check_rank(rank):
    if isinstance(rank, float):
        valid = 0 < rank < 1
    else:
        valid = rank is None or (isinstance(rank, int) and rank > 0)
    if not valid:
        raise ValueError(
            "`rank` must be a positive integer, or a share of the energy in "
            f"(0, 1). Received: rank={rank!r}"
        )


# -- Adapters ----------------------------------------------------------------


def _kernel_changes(model, name, adapter):
    """`{path: change at strength 1}`; raises if there is any other effect."""
    layers, changes, others = layer_tree.layers_by_path(model), {}, []
    for path, leaf in adapter_state.leaves(model, name).items():
        if not leaf.mergeable:
            others.append(f"`{path}` as a whole")
            continue
        layer = layers[path]
        view = kernel_of(layer) if has_kernel(layer) else None
        for variable, change in _deltas(leaf):
            if view is not None and variable is view.variable:
                changes[path] = view.to_matrix(change)
            elif view is None or change.any():
                others.append(f"`{path}.{variable.name}`")
    if others:
        raise ValueError(
            f"{type(adapter.method).__name__} changes more than kernels that "
            "are one matrix, and conversion to LoRA is for these alone: "
            f"{', '.join(others[:8])}. Serve this "
            "adapter merged, with `keras_peft.merge(model)`, or as it is. "
            f"Received: name={name!r}"
        )
    return changes


def _deltas(leaf):
    """What the adapter adds to weights when it takes part in full."""
    strength = keras.ops.convert_to_numpy(leaf.strength)
    leaf.strength.assign(1.0)
    try:
        return leaf.deltas()
    finally:
        leaf.strength.assign(strength)


# -- Fine-tunes --------------------------------------------------------------


def _variables(model):
    """`{(path, index, name): variable}` of all that a model's layers hold."""
    return {
        (path, index, variable.name): variable
        for path, layer in layer_tree.layers_by_path(model).items()
        for index, variable in enumerate(layer_tree.own_variables(layer))
    }


def _check_pair(base, tuned, ours, theirs):
    for role, model in (("base", base), ("tuned", tuned)):
        if any(layer_tree.adapted_layers(model)):
            raise ValueError(
                f"`{role}` carries adapters. Call `keras_peft.merge` or "
                f"`keras_peft.remove` on it first. Received: {model.name!r}"
            )
    wrong = [
        f"only one has `{path}.{name}`"
        for path, _, name in ours.keys() ^ theirs.keys()
    ]
    for key in ours.keys() & theirs.keys():
        shapes = ours[key].shape, theirs[key].shape
        if shapes[0] != shapes[1]:
            wrong.append(f"`{key[0]}.{key[2]}` has shapes {shapes}")
    if wrong:
        raise ValueError(
            "`base` and `tuned` must be of one architecture: "
            f"{'; '.join(sorted(wrong)[:8])}. "
            f"Received: base={base.name!r}, tuned={tuned.name!r}"
        )


def _differences(base, ours, theirs, head):
    """`({path: change of the kernel}, {variable: size of its change})`."""
    layers, changes, left_out = layer_tree.layers_by_path(base), {}, {}
    for key, variable in ours.items():
        path, _, name = key
        before, after = read(variable), read(theirs[key])
        if lies_in(path, head) or np.array_equal(before, after):
            continue
        if not np.isfinite(after).all():
            raise ValueError(
                "`tuned` holds NaN or infinity. "
                f"Received: variable=`{path}.{name}`"
            )
        layer = layers[path]
        view = kernel_of(layer) if has_kernel(layer) else None
        if view is not None and variable is view.variable:
            changes[path] = view.to_matrix(after - before)
        else:
            size = np.linalg.norm(before) or 1.0
            change = np.linalg.norm(after - before)
            left_out[f"{path}.{name}"] = float(change / size)
    if not changes:
        raise ValueError(
            "No kernel of `tuned` differs from that of `base`, so there is "
            "nothing for LoRA to hold. Other differences: "
            f"{', '.join(left_out) or 'none'}. Received: base={base.name!r}"
        )
    return changes, left_out
