"""Writing operators into an ONNX graph, and weights as they are stored."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.tape

from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.decoder import Linear
from keras_peft.export.genai.storage import Float
from keras_peft.export.genai.storage import Plan

MICROSOFT = "com.microsoft"
# What MatMulNBits may round its inputs to: int8, its fast kernels' type.
_INT8_INPUTS = 4


class Writer:
    """A graph while it grows.

    Args:
        plan: How each layer and table is stored.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.tape = ir.tape.Tape()
        self.constants: dict[str, ir.Value] = {}

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
            tensor = ir.tensor(np.ascontiguousarray(array), name=name)
            self.constants[name] = self.tape.initializer(tensor, name)
        return self.constants[name]

    def integers(self, *values: int) -> ir.Value:
        """A list of int64, such as a shape."""
        name = "integers." + "_".join(map(str, values))
        return self.constant(name, np.array(values, "int64"))

    def number(self, value: float) -> ir.Value:
        """A float32 scalar."""
        return self.constant(f"number.{value!r}", np.float32(value))

    def reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        """`Reshape`; 0 keeps a size, -1 takes what is left."""
        return self.op("Reshape", x, self.integers(*shape))

    # -- Linear layers and tables -------------------------------------------

    def linear(self, x: ir.Value, *parts: Linear) -> ir.Value:
        """What some layers make of the same inputs, one after the other."""
        groups: list[list[Linear]] = []
        for part in parts:
            if groups and self._fuse(groups[-1][-1], part):
                groups[-1].append(part)
            else:
                groups.append([part])
        made = [self._linear(x, group) for group in groups]
        return made[0] if len(made) == 1 else self.op("Concat", *made, axis=-1)

    def _fuse(self, one: Linear, other: Linear) -> bool:
        return _form(self._stored(one.key)) == _form(self._stored(other.key))

    def _stored(self, key: str) -> Any:
        return self.plan.get(key, Float())

    def _linear(self, x: ir.Value, parts: Sequence[Linear]) -> ir.Value:
        name = _common_name(parts)
        bias = None
        if any(part.bias is not None for part in parts):
            bias = self.constant(f"{name}.bias", lambda: _joined_bias(parts))
        stored = [self._stored(part.key) for part in parts]
        if not isinstance(stored[0], Float):
            return self._integer_linear(x, name, stored, bias)
        kernel = self._float(
            f"{name}.kernel",
            lambda: np.concatenate([part.kernel for part in parts], axis=1),
            stored[0],
        )
        product = self.op("MatMul", x, kernel)
        return product if bias is None else self.op("Add", product, bias)

    def _integer_linear(
        self,
        x: ir.Value,
        name: str,
        stored: Sequence[Any],
        bias: ir.Value | None,
    ) -> ir.Value:
        raise NotImplementedError

    def _float(
        self, name: str, make: Callable[[], np.ndarray], stored: Float
    ) -> ir.Value:
        """A weight as float32, whatever it is stored as."""
        value = self.constant(name, lambda: make().astype(stored.dtype))
        if stored.dtype == "float32":
            return value
        wide = f"{name}.wide"
        if wide not in self.constants:
            self.constants[wide] = self.op(
                "Cast", value, to=ir.DataType.FLOAT.value
            )
        return self.constants[wide]

    def rows(self, decoder: Decoder, ids: ir.Value) -> ir.Value:
        """The rows of the table for some tokens."""
        table = decoder.table
        stored = self._stored(table.key)
        name = f"{table.key}.rows"
        rows = self.constant(name, lambda: table.rows.astype(stored.dtype))
        found = self.op("Gather", rows, ids, axis=0)
        if stored.dtype == "float32":
            return found
        return self.op("Cast", found, to=ir.DataType.FLOAT.value)

    def logits(self, decoder: Decoder, x: ir.Value) -> ir.Value:
        """What the head makes of the last norm's outputs."""
        if decoder.head is not None:
            return self.linear(x, decoder.head)
        table = decoder.table
        stored = self._stored(table.key)
        rows = self._float(f"{table.key}.rows", lambda: table.rows, stored)
        flipped = self.op("Transpose", rows, perm=[1, 0])
        return self.op("MatMul", x, flipped)


def _form(stored: Any) -> tuple[Any, ...]:
    """What two layers must share to be stored as one."""
    if isinstance(stored, Float):
        return (stored.dtype,)
    return stored.bits, stored.block_size


def _common_name(parts: Sequence[Linear]) -> str:
    """`block.attention.query+key+value`."""
    first, *rest = [part.key for part in parts]
    return "+".join([first, *(key.rpartition(".")[2] for key in rest)])


def _joined_bias(parts: Sequence[Linear]) -> np.ndarray:
    return np.concatenate(
        [
            np.zeros(part.kernel.shape[1], "float32")
            if part.bias is None
            else part.bias
            for part in parts
        ]
    )
