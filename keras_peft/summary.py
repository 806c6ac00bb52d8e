"""A table of what is adapted."""

import collections
import math
from collections.abc import Callable

import keras

from keras_peft import adapter_state
from keras_peft import base_format
from keras_peft import layer_tree


def summary(
    model: keras.Model, print_fn: Callable[[str], object] = print
) -> None:
    """Prints a table of the adapters of `model`, layer by layer.

    Columns: the layer's path, the adapter's name (`*` while it is active) and
    method, its rank, its parameters, how many of them train, and its bytes.
    Below: the totals, the format of a base in 4 or 8 bits, and what
    `keras_peft.training` has put on the model.

    Args:
        model: An adapted model.
        print_fn: Takes the table as one string. Defaults to `print`.

    Raises:
        ValueError: if the model has no adapters.
    """
    from rich.console import Console
    from rich.table import Table

    state = adapter_state.state_of(model)
    table = Table(title=f"Adapters of {model.name!r}")
    table.add_column("Layer", no_wrap=True)
    table.add_column("Adapter")
    for column in ("Rank", "Parameters", "Trainable", "Bytes"):
        table.add_column(column, justify="right")
    for name, adapter in state.adapters.items():
        mark = "*" if name in state.active else ""
        label = f"{name}{mark} {type(adapter.method).__name__}"
        for path, leaf in adapter_state.leaves(model, name).items():
            rank = str(getattr(leaf, "rank", "-"))
            table.add_row(path, label, rank, *_sizes(leaf.parameters.values()))
    head = list(adapter_state.head_variables(model).values())
    if head:
        table.add_row(", ".join(state.head), "head", "-", *_sizes(head))
    # As wide as its longest path: a path cut short names no layer.
    console = Console(width=1000)
    with console.capture() as capture:
        console.print(table)
        for line in (_totals(model), *_base(model), *_training(model)):
            console.print(line)
    print_fn(capture.get())


def _sizes(variables):
    variables = list(variables)
    trained = [v for v in variables if v.trainable]
    return (
        f"{_count(variables):,}",
        f"{_count(trained):,}",
        f"{_bytes(variables):,}",
    )


def _totals(model):
    trainable, total = (
        _count(model.trainable_variables),
        _count(model.variables),
    )
    return f"Trainable: {trainable:,} of {total:,} ({trainable / total:.2%})"


def _base(model):
    formats = collections.Counter(base_format.formats(model).values())
    for form, count in formats.items():
        yield f"Base: kernels of {count} layers in {form}"


def _training(model):
    for why, count in layer_tree.reasons(model).items():
        yield f"Training: {why}" + (f", {count} layers" if count > 1 else "")


def _count(variables):
    return sum(math.prod(variable.shape) for variable in variables)


def _bytes(variables):
    return sum(
        keras.ops.convert_to_numpy(variable).nbytes for variable in variables
    )
