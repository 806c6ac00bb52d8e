"""Models that lie in parts on the devices that share a batch."""

import keras
from keras.distribution import TensorLayout

from keras_peft import layer_tree
from keras_peft.layouts import follow
from keras_peft.training.gathering import gather_weights


class FullyShardedDataParallel(keras.distribution.DataParallel):
    r"""Data parallelism for models that one device cannot hold.

    Of `N` devices each computes its share of every batch, as with
    `keras.distribution.DataParallel`, and holds one `N`-th of every kernel and
    table, cut along the longest of the axes that `N` divides. A layer puts its
    kernel together while it computes. Vectors, and kernels with no such axis,
    are on all devices; so are adapters and their optimizer's slots, which are
    small.

    A model that is created while this is the distribution is never whole on
    one device. Use `keras_peft.training.prepare(model, remat="full")` with it:
    without `remat`, kernels that were put together are kept for the backward
    pass. It is for JAX, as all of `keras.distribution`.

    - [Zhao et al., 2023](https://arxiv.org/abs/2304.11277)

    Args:
        device_mesh: Optional `keras.distribution.DeviceMesh` of one axis.
        devices: Optional list of devices. By default all that there are.
        auto_shard_dataset: Whether each process takes its part of a
            `tf.data.Dataset`, as in `keras.distribution.DataParallel`.

    Raises:
        ValueError: if the backend is not JAX.

    Example:
    >>> distribution = keras_peft.training.FullyShardedDataParallel()
    >>> keras.distribution.set_distribution(distribution)
    >>> causal_lm = keras_hub.models.CausalLM.from_preset("llama3_8b_en")
    >>> keras_peft.adapt(causal_lm, keras_peft.LoRA(rank=16))
    >>> keras_peft.training.prepare(causal_lm, remat="full")
    """

    def __init__(self, device_mesh=None, devices=None, auto_shard_dataset=True):
        _check_backend()
        super().__init__(device_mesh, devices, auto_shard_dataset)

    def get_variable_layout(self, variable):
        own = layer_tree.layout_of(variable)
        if own is not None:
            return own
        axes = _axes(variable.shape, self.num_model_replicas)
        named = [self.batch_dim_name if split else None for split in axes]
        return TensorLayout(named, self.device_mesh)


def _axes(shape, count):
    """Which axis of a kernel or table is cut in `count` parts."""
    fitting = [size for size in shape if size % count == 0]
    if len(shape) < 2 or not fitting:
        return [False] * len(shape)
    longest = shape.index(max(fitting))
    return [axis == longest for axis in range(len(shape))]


def _beside(model):
    """What training keeps beside the variables of the model."""
    optimizer = getattr(model, "optimizer", None)
    metrics = getattr(model, "metrics_variables", [])
    return [*metrics, *(optimizer.variables if optimizer else ())]


def _check_backend():
    backend = keras.config.backend()
    if backend != "jax":
        other = (
            "Start one process per GPU with torchrun, and call "
            "`keras_peft.training.data_parallel(model)`."
            if backend == "torch"
            else "Create the model under `tf.distribute.MirroredStrategy`."
        )
        raise ValueError(
            "Keras distributes variables on JAX alone. "
            f"{other} Received: backend {backend!r}"
        )


def distribute(model: keras.Model) -> keras.Model:
    """Lays a model that is built already out on several devices, in place.

    Under `keras.distribution.set_distribution`, variables are put in their
    places when they are created. This puts those of an older model there, and
    of its adapters, optimizer and metrics; values stay as they are. The model
    has to fit on the device it comes from: create a larger one under the
    distribution instead, which then needs no `distribute`.

    Factors of LoRA lie as their kernel does: `A` along its inputs and `B`
    along its outputs, but whole where the kernel is split over the devices of
    the batch. So `adapt` places them too. What a `LayoutMap` says of their
    paths comes first.

    Args:
        model: A built model, adapted or not, compiled or not.

    Returns:
        `model`.

    Raises:
        ValueError: if the backend is not JAX, or no distribution is set.

    Example:
    >>> distribution = keras_peft.training.FullyShardedDataParallel()
    >>> keras.distribution.set_distribution(distribution)
    >>> keras_peft.training.distribute(causal_lm)
    >>> causal_lm.fit(inputs, targets)
    """
    _check_backend()
    distribution = keras.distribution.distribution()
    if distribution is None:
        raise ValueError(
            "No distribution is set. Call `keras.distribution."
            "set_distribution(...)` first, or work in its `scope()`. "
            f"Received: model={model.name!r}"
        )
    for variable in model.variables:
        layer_tree.lay_out(variable, distribution)
    for variable in _beside(model):
        nowhere_split = (None,) * len(variable.shape)
        layout = TensorLayout(nowhere_split, distribution.device_mesh)
        layer_tree.set_layout(variable, layout)
    for _, layer in layer_tree.adapted_layers(model):
        for adapter in layer.adapters.values():
            follow(layer, adapter)
    layer_tree.forget_compiled(model, optimizer=False)
    gather_weights(model)
    return model
