"""Gather without the wrapping of negative ids."""

import onnx_ir as ir

from keras_peft.export.passes import rewriting


def apply(model: ir.Model) -> int:
    """`gather(table, where(ids < 0, ids + rows, ids))` -> `gather(table, ids)`.

    Keras wraps negative ids around itself; ONNX's Gather does as well, and
    takes 32-bit ids without a cast.
    """
    count = 0
    for gather in rewriting.nodes(model, "Gather"):
        count += _unwrap(gather)
    return count


def _unwrap(gather: ir.Node) -> bool:
    where = gather.inputs[1].producer()
    if where is None or where.op_type != "Where":
        return False
    less, add, ids = where.inputs
    table = gather.inputs[0].shape
    less, add = less.producer(), add.producer()
    matches = (
        table is not None
        and rewriting.integer(gather, "axis", 0) == 0
        and less is not None
        and less.op_type == "Less"
        and ids in (less.inputs[0], _before_cast(less.inputs[0]))
        and rewriting.scalar(less.inputs[1]) == 0
        and add is not None
        and add.op_type == "Add"
        and add.inputs[0] is ids
        and rewriting.scalar(add.inputs[1]) == table[0]
    )
    if not matches:
        return False
    if _before_cast(ids).dtype in (ir.DataType.INT32, ir.DataType.INT64):
        ids = _before_cast(ids)
    gather.replace_input_with(1, ids)
    return True


def _before_cast(value: ir.Value) -> ir.Value:
    cast = rewriting.made_by(value, "Cast")
    return value if cast is None else cast.inputs[0]
