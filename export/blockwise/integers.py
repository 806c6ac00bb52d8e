"""Kernels as integers in blocks, each with a scale and a zero point."""

import dataclasses
from collections.abc import Sequence

import numpy as np

BITS = (4, 8)


@dataclasses.dataclass(frozen=True, eq=False)
class Blockwise:
    """A kernel in 4 or 8 bits, as ONNX Runtime's `MatMulNBits` reads it.

    `block_size` inputs of an output share a scale and a zero point; the last
    block of a row may be shorter. The kernel is

    `kernel[i, o] = (values[o, i] - zero_points[o, b]) * scales[o, b]`

    with `b = i // block_size`, in float32.

    Attributes:
        values: uint8 array of shape `(outputs, inputs)`, below `2**bits`.
        scales: float32 array of shape `(outputs, blocks)`.
        zero_points: uint8 array of shape `(outputs, blocks)`, below `2**bits`.
        bits: 4 or 8.
        block_size: Inputs per block: a power of two, 16 at least.
    """

    values: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray
    bits: int
    block_size: int

    def __post_init__(self) -> None:
        check_format(self.bits, self.block_size)
        outputs, inputs = self.values.shape
        grid = (outputs, block_count(inputs, self.block_size))
        for name, shape, dtype in (
            ("values", self.values.shape, "uint8"),
            ("scales", grid, "float32"),
            ("zero_points", grid, "uint8"),
        ):
            array = getattr(self, name)
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(
                    f"`{name}` must be a {dtype} array of shape {shape}. "
                    f"Received: {array.dtype} of shape {array.shape}"
                )
        for name in ("values", "zero_points"):
            largest = getattr(self, name).max(initial=0)
            if largest >= 2**self.bits:
                raise ValueError(
                    f"`{name}` must fit into {self.bits} bits. "
                    f"Received: largest value {largest}"
                )

    @property
    def inputs(self) -> int:
        return self.values.shape[1]

    @property
    def outputs(self) -> int:
        return self.values.shape[0]

    @property
    def is_symmetric(self) -> bool:
        """Whether every zero point is the middle, which needs no storing."""
        return bool((self.zero_points == 2 ** (self.bits - 1)).all())

    def select(self, outputs: np.ndarray | slice) -> "Blockwise":
        """Some of its outputs, in the order given."""
        return dataclasses.replace(
            self,
            values=self.values[outputs],
            scales=self.scales[outputs],
            zero_points=self.zero_points[outputs],
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, as they are stored."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def kernel(self) -> np.ndarray:
        """The float32 array of shape `(inputs, outputs)` it stands for."""
        whole = spread(self.zero_points, self.block_size, self.inputs)
        kernel = self.values.astype("float32") - whole
        kernel *= spread(self.scales, self.block_size, self.inputs)
        return np.ascontiguousarray(kernel.T)

    def tensors(self) -> dict[str, np.ndarray]:
        """The inputs of `MatMulNBits`, by their names in its definition.

        Two values of 4 bits share a byte, the earlier one in its lower half.
        `zero_points` is missing where each is the operator's default.
        """
        blocks = self.scales.shape[1]
        padding = blocks * self.block_size - self.inputs
        values = np.pad(self.values, ((0, 0), (0, padding)))
        tensors = {
            "B": pack(values, self.bits).reshape(self.outputs, blocks, -1),
            "scales": self.scales,
        }
        if not self.is_symmetric:
            tensors["zero_points"] = pack(self.zero_points, self.bits)
        return tensors


def concatenate(parts: Sequence[Blockwise]) -> Blockwise:
    """Kernels of the same inputs as one with all their outputs.

    Raises:
        ValueError: If their inputs, bits or block sizes differ.
    """
    formats = {(part.inputs, part.bits, part.block_size) for part in parts}
    if len(formats) != 1:
        raise ValueError(
            "Kernels can be put beside each other only where they have as many "
            "inputs, bits and inputs per block. Received: (inputs, bits, "
            f"block_size)={sorted(formats)}"
        )
    return Blockwise(
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate([part.zero_points for part in parts]),
        parts[0].bits,
        parts[0].block_size,
    )


def check_format(bits: int, block_size: int) -> None:
    """Raises a `ValueError` for a format that the operator does not have."""
    if bits not in BITS:
        raise ValueError(f"`bits` must be 4 or 8. Received: bits={bits!r}")
    power = isinstance(block_size, int) and block_size & (block_size - 1) == 0
    if not power or block_size < 16:
        raise ValueError(
            "`block_size` must be a power of two, 16 at least. "
            f"Received: block_size={block_size!r}"
        )


def block_count(inputs: int, block_size: int) -> int:
    """Blocks per output; the last one may be shorter."""
    return -(-inputs // block_size)


def spread(grid: np.ndarray, block_size: int, inputs: int) -> np.ndarray:
    """One entry per block as one per input: `(outputs, inputs)`."""
    return np.repeat(grid, block_size, axis=1)[:, :inputs]


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Rows of values as rows of bytes; an odd row ends in half a byte."""
    if bits == 8:
        return values
    values = np.pad(values, ((0, 0), (0, values.shape[1] % 2)))
    return values[:, ::2] | values[:, 1::2] << 4
