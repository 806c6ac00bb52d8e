"""Which of several processes writes files."""

import keras

from keras_peft import layer_tree


def writes_files(model: keras.Model) -> bool:
    """Whether this process is the one that writes files of `model`."""
    if keras.config.backend() == "jax":
        import jax

        return jax.process_index() == 0
    if layer_tree.is_replaced(model, "make_train_function"):
        from torch import distributed

        return distributed.get_rank() == 0
    return True
