"""How much the loss depends on each weight, summed up by the optimizer.

The optimizer alone sees weights and gradients in every step on all backends,
inside what is compiled. For the time of one `fit` it gets a subclass of its own
class, and variables beside its slots.
"""

import keras
from keras import ops

from keras_peft import layer_tree


class Importance:
    """What an optimizer keeps while it watches some variables.

    Attributes:
        steps: Variable, the steps since the beginning.
        betas: The two factors of smoothing.
    """

    def __init__(self, optimizer, variables, betas):
        self.betas = betas
        self.key = optimizer._var_key
        self.steps = optimizer.add_variable((), dtype="int32", name="steps")
        self.sums = {
            self.key(variable): tuple(
                optimizer.add_variable_from_reference(variable, name)
                for name in ("sensitivity", "uncertainty")
            )
            for variable in variables
        }

    def of(self, variable):
        """`(sensitivity, uncertainty)` of a variable; `None` if unwatched."""
        return self.sums.get(self.key(variable))

    def variables(self):
        return [self.steps, *(v for pair in self.sums.values() for v in pair)]


class WatchingOptimizer:
    """Mixed into the class of an optimizer that watches importance."""

    def apply(self, grads, trainable_variables=None):
        grads = list(grads)
        variables = list(trainable_variables or self._trainable_variables)
        for gradient, variable in zip(grads, variables, strict=True):
            sums = self.importance.of(variable)
            if sums is not None and gradient is not None:
                self._watch(gradient, variable, *sums)
        self.assign_add(self.importance.steps, 1)
        super().apply(grads, trainable_variables)

    def _watch(self, gradient, variable, sensitivity, uncertainty):
        """Equations 8 to 10 of the AdaLoRA paper."""
        beta1, beta2 = self.importance.betas
        gradient = ops.convert_to_tensor(gradient)
        found = ops.abs(ops.multiply(variable, gradient))
        found = found / (self.loss_scale_factor or 1.0)
        smooth = beta1 * sensitivity + (1 - beta1) * found
        spread = ops.abs(found - smooth)
        self.assign(uncertainty, beta2 * uncertainty + (1 - beta2) * spread)
        self.assign(sensitivity, smooth)

    def save_own_variables(self, store):
        # As the optimizer that a model file describes, which has no more.
        own = {id(variable) for variable in self.importance.variables()}
        kept = [v for v in self.variables if id(v) not in own]
        for index, variable in enumerate(kept):
            store[str(index)] = ops.convert_to_numpy(variable)


def watch(model: keras.Model, variables: list, betas: tuple) -> Importance:
    """Lets the optimizer of a model that is about to train watch variables."""
    optimizer = _innermost(model)
    if isinstance(optimizer, WatchingOptimizer):  # A `fit` was interrupted.
        unwatch(model)
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    importance = Importance(optimizer, variables, betas)
    layer_tree.set_plain(optimizer, "importance", importance)
    layer_tree.mix_in(optimizer, WatchingOptimizer)
    model.make_train_function(force=True)
    return importance


def unwatch(model: keras.Model) -> None:
    """Undoes `watch`."""
    optimizer = _innermost(model)
    layer_tree.mix_out(optimizer, WatchingOptimizer)
    layer_tree.drop_variables(optimizer, optimizer.importance.variables())
    object.__delattr__(optimizer, "importance")
    model.train_function = None


def _innermost(model):
    """The optimizer that sees gradients as they are, without a loss scale."""
    return getattr(model.optimizer, "inner_optimizer", model.optimizer)
