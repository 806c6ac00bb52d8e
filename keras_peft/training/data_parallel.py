"""Training on several GPUs with torch: one process for each of them."""

import contextlib
import functools
import random

import keras
import numpy as np

from keras_peft import layer_tree
from keras_peft.adapted_model import trained_norms
from keras_peft.training.capture import Recorder
from keras_peft.training.capture import is_recorded

_WHY = "batches shared by processes"


def data_parallel(model: keras.Model) -> keras.Model:
    """Shares the batches of `fit` among the processes of torchrun, in place.

    Every process runs the same script, each on a device of its own, and calls
    `fit` with the same data and the batch size of all together. Each computes
    its rows of every batch; gradients are averaged, by rows, before the
    optimizer applies them. So a run does what it would do on one device with
    that batch size. A batch of fewer rows than processes is computed by all,
    and counts as often in metrics. Where training starts, all processes get
    the variables of process 0.

    `evaluate` shares its batches likewise, so every process has to call it.
    Losses and metrics are those of whole batches, everywhere, so that
    callbacks decide alike. `predict`, `generate()` and calling the model are
    each process's own. `keras_peft.save_adapter` and
    `keras_peft.AdapterCheckpoint` write in process 0 alone; give callbacks of
    Keras that write files to that process only.

    It does the work of `torch.nn.parallel.DistributedDataParallel`, which is
    called in place of a model, and so not by `fit`. What travels are the
    gradients of what trains, as one message. A loss that divides by something
    else than rows, such as tokens that a mask keeps, is averaged by rows
    nevertheless. Random numbers of dropout differ between processes. Steps
    can be recorded (`keras_peft.training.capture_steps`): on torch, saying
    each operation anew is what a step waits for.

    `keras_peft.training.restore` undoes it.

    Args:
        model: A model, adapted or not, compiled or not.

    Returns:
        `model`.

    Raises:
        ValueError: if the backend is not torch, or torch's processes are not
            initialized; in `fit`, if the loss is a sum over rows, or the model
            is compiled with `jit_compile=True`.

    Example:
    >>> torch.distributed.init_process_group()  # torchrun starts the processes
    >>> torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    >>> keras_peft.adapt(causal_lm, keras_peft.LoRA(rank=8))
    >>> keras_peft.training.data_parallel(causal_lm)
    >>> causal_lm.compile("adam")
    >>> causal_lm.fit(inputs, targets, batch_size=32)
    """
    _check_processes(model)
    for name, method in _METHODS.items():
        layer_tree.replace_method(model, name, method, _WHY)
    layer_tree.forget_compiled(model, optimizer=False)
    return model


def _check_processes(model):
    backend = keras.config.backend()
    if backend != "torch":
        other = (
            "keras.distribution.set_distribution("
            "keras.distribution.DataParallel())"
            if backend == "jax"
            else "with tf.distribute.MirroredStrategy().scope()"
        )
        raise ValueError(
            "`data_parallel` is for torch. Create the model under "
            f"`{other}` instead. Received: backend {backend!r}"
        )
    import torch.distributed

    if not torch.distributed.is_initialized():
        raise ValueError(
            "The processes do not know of each other. Start the script with "
            "`torchrun --nproc-per-node=<GPUs>` and call "
            "`torch.distributed.init_process_group()` first. "
            f"Received: model={model.name!r} in a process alone"
        )


def _make_train_function(model, force=False):
    is_new = force or model.train_function is None
    if is_new:
        _check_compiled(model)
    layer_tree.method_of_class(model, "make_train_function")(force)
    if is_new:
        _start_alike(model)
        function = model.train_function
        compute = Recorder(model) if is_recorded(model) else _plain(function)
        model.train_function = functools.partial(
            _train, model, _statistics(model), compute
        )


def _plain(function):
    return lambda data, weight: function(data)


def _make_test_function(model, force=False):
    is_new = force or model.test_function is None
    layer_tree.method_of_class(model, "make_test_function")(force)
    if is_new:
        compute = model.test_function
        model.test_function = lambda data: compute(_share(data)[0])


def _get_metrics_result(model):
    """The metrics of what all processes saw: their variables are sums."""
    variables = model.metrics_variables
    sums = _added_up(layer_tree.values_of(variables))
    with layer_tree.StandIns(zip(variables, sums, strict=True)):
        return layer_tree.method_of_class(model, "get_metrics_result")()


_METHODS = {
    "make_train_function": _make_train_function,
    "make_test_function": _make_test_function,
    "get_metrics_result": _get_metrics_result,
}


def _check_compiled(model):
    losses = keras.tree.flatten(model.loss)
    sums = [x for x in losses if getattr(x, "reduction", None) == "sum"]
    if sums:
        raise ValueError(
            "Gradients are averaged over the rows of a batch, so its loss has "
            "to be a mean over them. Use `reduction='sum_over_batch_size'`. "
            f"Received: loss {sums[0].name!r} with reduction='sum'"
        )
    if model.jit_compile:
        raise ValueError(
            "Gradients are averaged between the parts of a step, which "
            "`torch.compile` takes as a whole. Compile the model with "
            f"`jit_compile=False`. Received: jit_compile={model.jit_compile}"
        )


def _start_alike(model):
    """Gives all processes the variables and random numbers of process 0."""
    import torch

    seed = torch.tensor(random.randint(0, 2**31 - 1))
    seed = seed.to(keras.ops.convert_to_tensor(0.0).device)
    values = [v.value.data for v in model.variables]
    values += [v.value.data for v in model.optimizer.variables]
    for value in (seed, *values):
        torch.distributed.broadcast(value, src=0)
    random.seed(seed.item())
    np.random.seed(seed.item())
    torch.manual_seed(seed.item())


def _train(model, statistics, compute, data):
    share, weight = _share(data)
    with _own_random_numbers(), _averaging(model.optimizer, weight):
        logs = compute(share, weight)
    _average(statistics)
    return logs


def _share(data):
    """`(the rows of this process, their share of the batch)`."""
    from torch import distributed

    rank, count = distributed.get_rank(), distributed.get_world_size()
    rows = keras.tree.flatten(data)[0].shape[0]
    if rows < count:  # Then all compute all.
        return data, 1 / count
    start, stop = rank * rows // count, (rank + 1) * rows // count
    share = keras.tree.map_structure(lambda array: array[start:stop], data)
    return share, (stop - start) / rows


@contextlib.contextmanager
def _own_random_numbers():
    """Within, each process draws its own; before and after, all the same."""
    import torch

    seed = int(torch.randint(2**31, ())) + torch.distributed.get_rank()
    cuda = torch.cuda.is_available()
    with torch.random.fork_rng([torch.cuda.current_device()] if cuda else []):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _averaging(optimizer, weight):
    """Within, `optimizer` applies the gradients of all processes."""
    apply = optimizer.apply

    def apply_average(gradients, variables):
        found = [
            keras.ops.zeros_like(v.value) if gradient is None else gradient
            for gradient, v in zip(gradients, variables, strict=True)
        ]
        return apply(_added_up(found, weight), variables)

    layer_tree.set_plain(optimizer, "apply", apply_average)
    try:
        yield
    finally:
        object.__delattr__(optimizer, "apply")


def _statistics(model):
    """What batch normalization keeps, which is to be the same everywhere."""
    return [
        variable
        for layer in trained_norms(model).values()
        for variable in layer.non_trainable_variables
    ]


def _average(variables):
    import torch

    if variables:
        share = 1 / torch.distributed.get_world_size()
        sums = _added_up(layer_tree.values_of(variables), share)
        for variable, value in zip(variables, sums, strict=True):
            variable.assign(value)


def _added_up(tensors, weight=1.0):
    """The sums of `weight * tensor` over all processes, as one message."""
    import torch

    flat = torch.cat([t.detach().reshape(-1).float() for t in tensors])
    flat *= weight
    torch.distributed.all_reduce(flat)
    parts = torch.split(flat, [t.numel() for t in tensors])
    return [
        part.reshape(t.shape).to(t.dtype)
        for part, t in zip(parts, tensors, strict=True)
    ]
