"""Writing operators and constants into an ONNX graph."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.tape

from keras_peft.export.genai.slots import Slots
from keras_peft.export.genai.storage import Float
from keras_peft.export.genai.storage import Plan

MICROSOFT = "com.microsoft"


class Writer:
    """A graph while it grows.

    Args:
        plan: How each layer and table is stored.
        slots: What adapters may change at run time.
    """

    def __init__(self, plan: Plan, slots: Slots | None = None):
        self.plan = plan
        self.slots = slots or Slots()
        self.tape = ir.tape.Tape()
        self.constants: dict[str, ir.Value] = {}
        self._shared: dict[str, ir.Value] = {}
        # Inputs of the graph that have a default, and the layers of each.
        self.defaults: list[ir.Value] = []
        self.adaptable: dict[str, list[str]] = {}

    def stored(self, key: str) -> Any:
        """How the layer or table of this key is stored."""
        return self.plan.get(key, Float())

    def op(
        self,
        name: str,
        *inputs: ir.Value | None,
        domain: str = "",
        outputs: int = 1,
        **attributes: Any,
    ) -> Any:
        """Adds an operator; its output, or a list where there are several."""
        made = self.tape.op_multi_out(
            name,
            inputs,
            num_outputs=outputs,
            attributes=attributes,
            domain=domain,
        )
        return made[0] if outputs == 1 else made

    def fused(self, name: str, *inputs: ir.Value | None, **rest: Any) -> Any:
        """The same of ONNX Runtime's own operators."""
        return self.op(name, *inputs, domain=MICROSOFT, **rest)

    def constant(
        self, name: str, make: np.ndarray | Callable[[], np.ndarray]
    ) -> ir.Value:
        """A weight or constant, made once for each name."""
        if name not in self.constants:
            array = make() if callable(make) else make
            tensor = ir.tensor(np.asarray(array, order="C"), name=name)
            self.constants[name] = self.tape.initializer(tensor, name)
        return self.constants[name]

    def default(
        self, name: str, array: np.ndarray, shape: Sequence[int | str]
    ) -> ir.Value:
        """An input that is `array` unless an adapter file gives another."""
        value = self.constant(name, array.astype("float32"))
        value.shape = ir.Shape(shape)
        self.defaults.append(value)
        return value

    def shared(self, name: str, make: Callable[[], ir.Value]) -> ir.Value:
        """What several blocks need alike, computed once for each name."""
        if name not in self._shared:
            self._shared[name] = make()
        return self._shared[name]

    def integers(self, *values: int) -> ir.Value:
        """A list of int64, such as a shape."""
        name = "integers." + "_".join(map(str, values))
        return self.constant(name, np.array(values, "int64"))

    def number(self, value: float) -> ir.Value:
        """A float32 scalar."""
        return self.constant(f"number.{value!r}", np.array(value, "float32"))

    def reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        """`Reshape`; 0 keeps a size, -1 takes what is left."""
        return self.op("Reshape", x, self.integers(*shape))
