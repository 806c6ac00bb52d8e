"""Which of several processes writes files."""

import keras

from keras_peft import layer_tree


def writes_files(model: keras.Model) -> bool:
    """Whether this process is the one that writes files of `model`."""
    if keras.config.backend() == "jax":
        import jax

        return jax.process_index() == 0
    if is_data_parallel(model):
        from torch import distributed

        return distributed.get_rank() == 0
    return True


def is_data_parallel(model: keras.Model) -> bool:
    """Whether `keras_peft.training.data_parallel` is on `model`."""
    return layer_tree.is_replaced(model, "get_metrics_result")
