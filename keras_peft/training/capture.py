"""Training steps of torch that the GPU repeats by itself."""

import keras

from keras_peft import layer_tree
from keras_peft.processes import is_data_parallel

# Steps that are done as ever before one is recorded: what is made once, such
# as an optimizer's slots and a library's workspace, is made in them.
_WARM = 3
# Answered by a model whose steps are recorded.
_MARK = "keras_peft_records_steps"


def capture_steps(model: keras.Model) -> keras.Model:
    """Lets the GPU repeat a training step without Python, in place.

    On torch, Keras says every operation of a step anew, which takes longer
    than a GPU needs for it. Here the fourth step of each shape of a batch is
    recorded as a CUDA graph; from then on a batch is copied to where that step
    read its own, and the recording runs. Losses, metrics, optimizers and
    schedules are those of Keras, since their state is in variables.

    A recording keeps the memory of a step for good. What asks the GPU for a
    number in the middle of a step cannot be recorded: dropout, which Keras
    seeds so, gradient accumulation and dynamic loss scaling. For these, leave
    it out. `keras_peft.training.restore` undoes it. With
    `keras_peft.training.data_parallel`, before or after, each process records
    its own steps, what it sends to the others included.

    Args:
        model: A built model.

    Returns:
        `model`.

    Raises:
        ValueError: if the backend is not torch with a GPU, or the model draws
            random numbers in training.

    Example:
    >>> keras_peft.training.capture_steps(causal_lm)
    >>> causal_lm.fit(inputs, targets)
    """
    check_capture(model)
    layer_tree.replace_method(model, _MARK, is_recorded, "steps recorded")
    if not is_data_parallel(model):  # Which asks whether they are recorded.
        layer_tree.replace_method(model, "make_train_function", _make_function)
    layer_tree.forget_compiled(model, optimizer=False)
    return model


def check_capture(model: keras.Model) -> None:
    """Raises a `ValueError` unless steps of `model` can be recorded."""
    if not _has_gpu():
        raise ValueError(
            "Steps are recorded by torch on a GPU of NVIDIA; JAX and "
            "TensorFlow compile them anyway. Leave it out here. Received: "
            f"backend {keras.config.backend()!r}, without such a GPU"
        )
    if layer_tree.is_random(model):
        raise ValueError(
            "The model draws random numbers in training, and Keras asks the "
            "GPU for the seed of each: such steps cannot be recorded. Leave "
            f"out dropout, or this. Received: model={model.name!r}"
        )


def _has_gpu():
    if keras.config.backend() != "torch":
        return False
    import torch

    return torch.cuda.is_available()


def is_recorded(model: keras.Model) -> bool:
    """Whether `capture_steps` is on `model`."""
    return layer_tree.is_replaced(model, _MARK)


def _make_function(model, force=False):
    if model.train_function is None or force:
        layer_tree.method_of_class(model, "make_train_function")(force)
        model.train_function = Recorder(model)


class Recorder:
    """Called with batches, as a training function of Keras.

    What else a step depends on are the other arguments, numbers: for each of
    their values there is a recording.
    """

    def __init__(self, model):
        import torch

        from keras_peft.training.device_constants import DeviceConstants

        self.model = model
        self.seen = {}
        self.recordings = {}
        self.constants = DeviceConstants()
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def __call__(self, data, *settings):
        import torch

        batch = keras.tree.map_structure(_on_gpu, data[0])
        tensors = [t for t in keras.tree.flatten(batch) if t is not None]
        kind = (settings, *((tuple(t.shape), t.dtype) for t in tensors))
        if kind not in self.recordings:
            count = self.seen[kind] = self.seen.get(kind, 0) + 1
            if count <= _WARM:
                self.stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.stream), self.constants:
                    logs = self.model.train_step(batch)
                torch.cuda.current_stream().wait_stream(self.stream)
                return logs
            self.recordings[kind] = self._record(batch)
        read, graph, logs = self.recordings[kind]
        for place, tensor in zip(read, tensors, strict=True):
            place.copy_(tensor)
        graph.replay()
        return keras.tree.map_structure(_copy, logs)

    def _record(self, batch):
        import torch

        graph = torch.cuda.CUDAGraph()
        # Its own: what is recorded reads them ever after.
        batch = keras.tree.map_structure(_copy, batch)
        # A recording has memory of its own.
        torch.cuda.empty_cache()
        try:
            # Other threads may ask the GPU: NCCL's own watches its work.
            recording = torch.cuda.graph(
                graph, pool=self.pool, capture_error_mode="thread_local"
            )
            with recording, self.constants:
                logs = self.model.train_step(batch)
        except RuntimeError as error:
            raise RuntimeError(
                "A training step could not be recorded, since something in it "
                "asks the GPU for a number: an optimizer that accumulates "
                "gradients or scales the loss, or a layer or metric. Train "
                "without `capture_steps`. Received: "
                f"{str(error).splitlines()[0]}"
            ) from error
        read = [t for t in keras.tree.flatten(batch) if t is not None]
        return read, graph, logs


def _copy(tensor):
    return None if tensor is None else tensor.clone()


def _on_gpu(array):
    import torch

    return None if array is None else torch.as_tensor(array, device="cuda")
