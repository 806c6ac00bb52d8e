"""`Erfc(x)` as `1 - Erf(x)`.

TensorFlow writes the exact GELU with it. tf2onnx passes the operator through,
which ONNX does not have, and the file does not load.
"""

from typing import Any

import numpy as np


def _convert(context: Any, node: Any, name: str, args: Any) -> None:
    x = node.input[0]
    output = node.output[0]
    dtype = context.get_dtype(output)
    shape = context.get_shape(output)
    context.remove_node(node.name)
    erf = context.make_node("Erf", [x], dtypes=[dtype], shapes=[shape])
    one = context.make_const(f"{node.name}_one", np.array(1, "float32"))
    context.make_node(
        "Sub",
        [one.output[0], erf.output[0]],
        outputs=[output],
        name=f"{node.name}_sub",
        dtypes=[dtype],
        shapes=[shape],
    )


OPERATORS: dict[str, Any] = {"Erfc": (_convert, [])}
