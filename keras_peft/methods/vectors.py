"""What methods that add a vector to variables of a layer share."""

from keras_peft import layer_tree
from keras_peft.methods.adapter import VariableAdapter
from keras_peft.patterns import lies_in


class OfVectors:
    """Mixed into settings of which each weight is added to a variable."""

    def variables(self, layer):
        """The variables of a built layer that get one."""
        raise NotImplementedError

    def accepts(self, layer):
        # Around other layers there is no norm: spectral normalization keeps
        # vectors of its own there.
        alone = not any(layer_tree.children(layer))
        return alone and bool(self.variables(layer))

    def default_targets(self, candidates):
        head = candidates.head
        return [p for p in candidates.adaptable if not lies_in(p, head)]

    def shapes(self, path, layer):
        changes = _changes(self.variables(layer))
        return {key: variable.shape for key, variable in changes.items()}

    def create(self, path, layer, name):
        changes = _changes(self.variables(layer))
        return VariableAdapter(layer, changes, name)


def _changes(variables):
    return {f"{variable.name}_change": variable for variable in variables}
