"""GELU as one operator."""

import math

import onnx_ir as ir

from keras_peft.export.passes import rewriting

# Gelu is an operator since.
_OPSET = 20
# Operators whose meaning changed on the way there.
_CHANGED = ("DFT", "GridSample")


def apply(model: ir.Model) -> int:
    """Rewrites the formulas that TensorFlow has for GELU; counts them.

    - `0.5 * x * (1 - erf(-x / sqrt(2)))`: Gelu.
    - `0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3)))`: Gelu
      by tanh.

    A graph of an older opset is declared as one of opset 20, unless it has
    an operator that changed its meaning.
    """
    if (model.opset_imports.get("") or 0) < _OPSET:
        if any(rewriting.nodes(model, *_CHANGED)):
            return 0
    count = sum(_rewrite(node) for node in rewriting.nodes(model, "Mul"))
    if count:
        version = max(model.opset_imports[""], _OPSET)
        model.opset_imports[""] = version
        model.graph.opset_imports[""] = version
    return count


def _rewrite(node: ir.Node) -> bool:
    for half, gate in (node.inputs, node.inputs[::-1]):
        x = _multiplied(half, 0.5)
        form = None if x is None else _form(gate, x)
        if form is not None:
            gelu = rewriting.before(node, "Gelu", [x], approximate=form)
            rewriting.replace(node.outputs[0], gelu)
            return True
    return False


def _form(gate: ir.Value, x: ir.Value) -> str | None:
    """Which GELU multiplies `x / 2` by `gate`; `None` for another."""
    if rest := rewriting.made_by(gate, "Sub"):
        erf = rewriting.made_by(rest.inputs[1], "Erf")
        if erf is None or rewriting.scalar(rest.inputs[0]) != 1:
            return None
        negative = _multiplied(erf.inputs[0], math.sqrt(0.5))
        minus = rewriting.made_by(negative, "Neg")
        return "none" if minus and minus.inputs[0] is x else None
    for one, other in rewriting.operands(gate, "Add"):
        tanh = rewriting.made_by(other, "Tanh")
        if tanh is None or rewriting.scalar(one) != 1:
            continue
        inner = _multiplied(tanh.inputs[0], math.sqrt(2 / math.pi))
        if _is_cubic(inner, x):
            return "tanh"
    return None


def _is_cubic(value: ir.Value | None, x: ir.Value) -> bool:
    """`x + 0.044715 * x ** 3`."""
    for first, term in rewriting.operands(value, "Add"):
        power = rewriting.made_by(_multiplied(term, 0.044715), "Pow")
        if first is x and power is not None and power.inputs[0] is x:
            return rewriting.scalar(power.inputs[1]) == 3
    return False


def _multiplied(value: ir.Value, factor: float) -> ir.Value | None:
    """The other factor of a product with a number."""
    for number, other in rewriting.operands(value, "Mul"):
        found = rewriting.scalar(number)
        # The number was rounded to float32.
        if found is not None and math.isclose(found, factor, rel_tol=2**-23):
            return other
    return None
