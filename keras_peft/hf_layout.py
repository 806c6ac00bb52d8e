"""Where each entry of a Keras variable lies in a Hugging Face tensor.

A converter of keras-hub tells a loader, weight by weight, which Hugging Face
tensor goes to which variable and by which function it is laid out. A loader
that only takes notes gives the names; running the functions over numbered
entries gives the exact places. No family needs a table.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import keras
import numpy as np

from keras_peft.kernels import ConvKernel
from keras_peft.kernels import DenseKernel
from keras_peft.kernels import EmbeddingKernel


@dataclasses.dataclass(frozen=True)
class Ported:
    """A variable, and the function that lays a tensor out for it."""

    variable: keras.Variable
    hook: Callable[[np.ndarray, list[int]], np.ndarray] | None

    def of(self, tensor: np.ndarray) -> np.ndarray | None:
        """What the variable gets of `tensor`, or `None` if that is too small.

        The function belongs to the converter: whatever it raises, a tensor of
        this shape is not what it is for.
        """
        shape = tuple(self.variable.shape)
        try:
            found = self.hook(tensor, list(shape)) if self.hook else tensor
        except Exception:
            return None
        return found if np.shape(found) == shape else None


@dataclasses.dataclass(frozen=True)
class Part:
    """Where the `[inputs, outputs]` matrix of a layer lies in a HF weight.

    Attributes:
        module: The HF module, without the prefix that its class adds.
        shape: Shape of the module's `weight`.
        inputs: HF input of each row of the matrix.
        outputs: HF output of each column; a fused module has more than these.
        transposed: Whether the weight is `[inputs, outputs]`, as of a HF
            `Conv1D` or an embedding, and not `[outputs, inputs]`.
    """

    module: str
    shape: tuple[int, ...]
    inputs: np.ndarray
    outputs: np.ndarray
    transposed: bool

    @property
    def sizes(self) -> tuple[int, int]:
        """Inputs and outputs of the whole module."""
        first, rest = self.shape[0], math.prod(self.shape[1:])
        return (first, rest) if self.transposed else (rest, first)


class _Notes:
    """Stands in for keras-hub's loader, and only takes notes."""

    safetensor_config = None
    prefix = ""

    def __init__(self):
        self.ported: dict[str, list[Ported]] = {}

    def port_weight(self, keras_variable, hf_weight_key, hook_fn=None):
        ported = Ported(keras_variable, hook_fn)
        self.ported.setdefault(hf_weight_key, []).append(ported)

    def get_tensor(self, hf_weight_key):
        if hf_weight_key.endswith(".gamma"):
            # Converters ask whether norms bear their oldest names; no module
            # of a live model does.
            raise KeyError(hf_weight_key)
        return np.zeros((1, 1), "float32")

    def get_prefixed_key(self, hf_weight_key, dict_like):
        return hf_weight_key


def record(
    converter: ModuleType, backbone: keras.Model, config: dict[str, Any]
) -> tuple[dict[str, list[Ported]], str | None]:
    """`({HF tensor: [Ported, ...]}, why the converter stopped early)`.

    Without a checkpoint at hand, a converter stops where it reads tensors
    itself (the experts of a mixture); what it ported before that stands.
    """
    notes, stopped = _Notes(), None
    with _untouched(backbone):
        try:
            converter.convert_weights(backbone, notes, config)
        except Exception as error:
            stopped = f"keras-hub's converter stopped before it ({error})"
    return notes.ported, stopped


@contextlib.contextmanager
def _untouched(backbone: keras.Model) -> Iterator[None]:
    """Within, nothing that a converter does changes a weight."""
    variables = backbone.variables
    for variable in variables:
        variable.assign = lambda value: None
    try:
        yield
    finally:
        for variable in variables:
            del variable.assign


class Layouts:
    """Numbers the entries of tensors, and remembers equal layouts."""

    def __init__(self):
        self._known: dict[Any, Any] = {}
        self._parts: dict[Any, Part | None] = {}

    def entries(
        self, ported: Sequence[Ported], shape: tuple[int, ...]
    ) -> list[np.ndarray] | None:
        """For each variable, the flat entry of the tensor at each of its own.

        `None` if the variables do not take every entry of such a tensor, or
        one takes an entry twice: it has another shape then.
        """
        key = (shape, *map(_identity, ported))
        if key not in self._known:
            self._known[key] = _entries(ported, shape)
        return self._known[key]

    def part(
        self,
        module: str,
        kernels: Sequence[tuple[Ported, DenseKernel]],
        position: int,
    ) -> Part | None:
        """The `Part` of one of the kernels that share a HF weight."""
        ported, kernel = kernels[position]
        if ported.hook is None and isinstance(kernel, EmbeddingKernel):
            shape = (kernel.inputs, kernel.outputs)
            whole = np.arange(kernel.inputs), np.arange(kernel.outputs)
            return Part(module, shape, *whole, transposed=True)
        # Blocks repeat: all their layers but the first few are known.
        key = (position, *(_identity(*each) for each in kernels))
        if key not in self._parts:
            self._parts[key] = self._find(kernels, position)
        part = self._parts[key]
        return part and dataclasses.replace(part, module=module)

    @staticmethod
    def _find(kernels, position):
        _, kernel = kernels[position]
        ported = [each for each, _ in kernels]
        total = sum(math.prod(each.variable.shape) for each in ported)
        for shape in dict.fromkeys(_weight_shapes(kernel, total)):
            entries = _entries(ported, shape)
            if entries is not None:
                matrix = kernel.to_matrix(entries[position])
                if part := _separate(shape, matrix):
                    return part
        return None


def _identity(ported, kernel=None):
    """Equal for functions that do the same to variables of one shape."""
    hook, shape = ported.hook, tuple(ported.variable.shape)
    view = None
    if kernel is not None:
        axes = tuple(getattr(kernel, "to_axes", ()))
        view = type(kernel), kernel.inputs, kernel.outputs, axes
    code = getattr(hook, "__code__", None)
    if code is None:
        return shape, view, hook
    cells = [cell.cell_contents for cell in hook.__closure__ or ()]
    return shape, view, code, repr(cells), repr(hook.__defaults__)


def _weight_shapes(kernel, total):
    """Shapes that the HF weight of `total` entries may have, likeliest first.

    Several kernels may share one: all have the same inputs then, or else the
    same outputs.
    """
    if isinstance(kernel, EmbeddingKernel):
        yield kernel.inputs, kernel.outputs
    elif isinstance(kernel, ConvKernel):
        *taps, channels = kernel.taps
        yield kernel.outputs, channels, *taps
    else:
        for rows in (kernel.inputs, kernel.outputs):
            yield total // rows, rows
            yield rows, total // rows
        yield kernel.outputs, kernel.inputs
        yield kernel.inputs, kernel.outputs


class _Numbers(np.ndarray):
    """Numbers that keep their values where a converter rounds weights."""

    def astype(self, *args, **kwargs):
        return self


def _entries(ported, shape):
    size = math.prod(shape)
    dtype = "int32" if size < 2**31 else "int64"
    numbers = np.arange(size, dtype=dtype).reshape(shape).view(_Numbers)
    found = [each.of(numbers) for each in ported]
    if any(entries is None or entries.dtype.kind != "i" for entries in found):
        return None
    found = [np.asarray(entries) for entries in found]
    taken = np.zeros(size, bool)
    for entries in found:
        if entries.min() < 0 or entries.max() >= size:
            return None
        own = np.zeros(size, bool)
        own[entries.ravel()] = True
        if own.sum() != entries.size:
            return None
        taken |= own
    return found if taken.all() else None


def _separate(shape, matrix):
    """A `Part`, if each row of `matrix` is a HF input, each column an output.

    `matrix` holds the flat entry of the HF weight at each of its places.
    """
    first, rest = np.divmod(matrix, math.prod(shape[1:]))
    if _one_per_column(first) and _one_per_column(rest.T):
        return Part("", shape, rest[:, 0], first[0], transposed=False)
    if _one_per_column(first.T) and _one_per_column(rest):
        return Part("", shape, first[:, 0], rest[0], transposed=True)
    return None


def _one_per_column(matrix):
    return bool((matrix == matrix[:1]).all())
