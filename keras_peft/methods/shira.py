"""SHiRA: a change of a few entries of the kernel, of any rank."""

import keras
import numpy as np
from keras import ops

from keras_peft.kernels import kernel_of
from keras_peft.methods.adapter import VariableAdapter
from keras_peft.methods.method import Method
from keras_peft.methods.settings import check_positive_integer


@keras.saving.register_keras_serializable(package="keras_peft")
class SHiRA(Method):
    """Sparse high-rank adaptation: some entries of the kernel learn.

    As many entries learn as LoRA of the same rank has parameters:
    `rank * (inputs + outputs)` per layer. Which ones is drawn when the model is
    adapted, and is kept in the adapter file beside their values, as two 32-bit
    integers each. The values start at zero, so that every adapted model starts
    as its base.

    A step puts the values into an array of the kernel's size and adds the
    kernel; its gradient is of that size too. None of the three backends has a
    product of a dense and a sparse matrix that is differentiable and compiled
    and costs less. So a training step costs the time of full fine-tuning, and
    the memory of a kernel for each adapted layer, but no optimizer slots for
    it. Small adapters that change few entries are quick to swap and seldom
    collide; for small training steps use LoRA.

    - [Bhardwaj et al., 2024](https://arxiv.org/abs/2406.13175): SHiRA, here
      with its random mask

    Args:
        rank: Positive integer; 8 to 32 is usual. At most
            `inputs * outputs / (inputs + outputs)` of every adapted kernel.

    Raises:
        ValueError: if `rank` is out of its range.

    Example:
    >>> keras_peft.adapt(model, keras_peft.SHiRA(rank=16))
    """

    def __init__(self, rank=32):
        self.rank = rank
        check_positive_integer("rank", rank, "8 to 32")

    def objection(self, path, layer):
        kernel = kernel_of(layer)
        size = kernel.inputs * kernel.outputs
        if self._count(kernel) > size:
            return (
                f"rank {self.rank} asks for {self._count(kernel)} entries of "
                f"its kernel, which has {size}"
            )
        return None

    def _count(self, kernel):
        return self.rank * (kernel.inputs + kernel.outputs)

    def shapes(self, path, layer):
        count = self._count(kernel_of(layer))
        return {"shira_values": (count,), "shira_indices": (count, 2)}

    def create(self, path, layer, name):
        return SHiRAAdapter(self, path, layer, name)


class SHiRAAdapter(VariableAdapter):
    """The SHiRA of one layer.

    The kernel is changed before the layer multiplies by it: a product of the
    inputs with the change alone would be a second one of the same size.
    """

    def __init__(self, method, path, layer, name):
        self.kernel = kernel_of(layer)
        variables = {"kernel": self.kernel.variable}
        super().__init__(layer, variables, name, method.shapes(path, layer))

    def build_weights(self, shapes):
        self.shira_values = self.weight("shira_values", shapes["shira_values"])
        self.shira_indices = self.weight(
            "shira_indices",
            shapes["shira_indices"],
            trainable=False,
            dtype="int32",
        )

    def initialize(self, rng):
        kernel = self.kernel
        count, _ = self.shira_indices.shape
        size = kernel.inputs * kernel.outputs
        chosen = np.sort(rng.choice(size, count, replace=False))
        rows_and_columns = np.divmod(chosen, kernel.outputs)
        self.shira_indices.assign(np.stack(rows_and_columns, axis=1))

    def additions(self):
        kernel = self.kernel
        values = self.shira_values * self.strength
        # Not `ops.scatter`: on torch that is a loop over the entries.
        nothing = ops.zeros((kernel.inputs, kernel.outputs), values.dtype)
        delta = ops.scatter_update(nothing, self.shira_indices, values)
        return [(kernel.variable, kernel.as_kernel(delta))]
