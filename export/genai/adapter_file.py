"""Adapter files of ONNX Runtime: written, read, summed and switched on."""

from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from keras_peft.export.genai.slots import BASE
from keras_peft.export.genai.slots import A
from keras_peft.export.genai.slots import B

SUFFIX = ".onnx_adapter"
_VERSION = 1

Parameters = Mapping[str, np.ndarray]


class WithAdapter(onnxruntime.RunOptions):
    """Options of one run: the base together with an adapter.

    `session.run(None, inputs, WithAdapter(session, "my.onnx_adapter"))`. Keep
    it for as many runs as you like; runs without it are those of the base.

    Args:
        session: The session that will run, of a model with places for it.
        path: The adapter file.

    Raises:
        ValueError: If it is no adapter of the session's base.
    """

    def __init__(self, session: onnxruntime.InferenceSession, path: str | Path):
        super().__init__()
        _, base = read_file(path)
        own = session.get_modelmeta().custom_metadata_map.get(BASE)
        if own is None or int(own) != base:
            raise ValueError(
                "The adapter file belongs to another base, or the model was "
                "exported without places for adapters. Use both as one export "
                f"wrote them. Received: {str(path)!r}"
            )
        # ONNX Runtime 1.31 keeps a bare pointer: an adapter that is gone
        # takes no part, and nothing says so.
        self.adapter = onnxruntime.LoraAdapter()
        self.adapter.Load(str(path))
        self.add_active_adapter(self.adapter)


def write_file(path: str | Path, parameters: Parameters, base: int) -> None:
    """Writes an adapter file, and compares what it holds.

    Args:
        path: The file.
        parameters: Arrays by the names of the graph's inputs.
        base: What tells the base from others, as the model file has it.

    Raises:
        ValueError: If a number is not finite, or the file does not hold what
            it was given.
    """
    wrong = [k for k, v in parameters.items() if not np.isfinite(v).all()]
    if wrong:
        raise ValueError(
            "The adapter holds NaN or infinity. Train it again with a lower "
            f"learning rate. Received: {', '.join(wrong[:8])}"
        )
    # They must live until the file is written: ONNX Runtime 1.31 keeps bare
    # pointers to their numbers.
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(
            np.ascontiguousarray(array, "float32")
        )
        for name, array in parameters.items()
    }
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(_VERSION)
    file.set_model_version(base)
    file.set_parameters(values)
    file.export_adapter(str(path))
    _compare(path, {k: v.numpy() for k, v in values.items()}, base)


def _compare(path: str | Path, expected: Parameters, base: int) -> None:
    found, found_base = read_file(path)
    same = found.keys() == expected.keys() and found_base == base
    if not same or any(
        not np.array_equal(found[name], expected[name]) for name in expected
    ):
        raise ValueError(
            "ONNX Runtime wrote an adapter file that holds other numbers than "
            f"it was given. Received: onnxruntime {onnxruntime.__version__}, "
            f"{str(path)!r}"
        )


def read_file(path: str | Path) -> tuple[dict[str, np.ndarray], int]:
    """`(arrays by name, base)` of an adapter file.

    Raises:
        ValueError: If there is none, or it is damaged.
    """
    try:
        file = onnxruntime.AdapterFormat.read_adapter(str(path))
        values = file.get_parameters()
        # Copies: the numbers lie in the file's memory.
        arrays = {k: np.array(v.numpy()) for k, v in values.items()}
        return arrays, file.get_model_version()
    except Exception as error:
        raise ValueError(
            f"No adapter file of ONNX Runtime ({error}). "
            f"Received: {str(path)!r}"
        ) from None


def sum_files(
    paths: Sequence[str | Path], weights: Sequence[float], path: str | Path
) -> None:
    """As `keras_peft.export.sum_adapters`."""
    if isinstance(paths, str | Path) or len(paths) != len(weights) or not paths:
        raise ValueError(
            "Expected a list of adapter files and one weight for each. "
            f"Received: files={paths!r}, weights={weights!r}"
        )
    files = [read_file(each) for each in paths]
    _check_summable(paths, files)
    names = dict.fromkeys(name for arrays, _ in files for name in arrays)
    found = {}
    for slot in dict.fromkeys(name.rpartition(".")[0] for name in names):
        a, b = f"{slot}.{A}", f"{slot}.{B}"
        having = [
            (weight, arrays[a], arrays[b])
            for weight, (arrays, _) in zip(weights, files, strict=True)
            if a in arrays
        ]
        found[a] = np.concatenate([a for _, a, _ in having], axis=1)
        found[b] = np.concatenate([w * b for w, _, b in having])
    write_file(path, found, files[0][1])


def _check_summable(
    paths: Sequence[str | Path],
    files: Sequence[tuple[dict[str, np.ndarray], int]],
) -> None:
    for path, (arrays, base) in zip(paths, files, strict=True):
        if base != files[0][1]:
            raise ValueError(
                "The adapters do not belong to one base. Sum adapters of one "
                f"export. Received: {str(path)!r}, compared with "
                f"{str(paths[0])!r}"
            )
        other = [name for name in arrays if not name.endswith((A, B))]
        if other:
            raise ValueError(
                "Only changes of low rank can be summed, and this adapter "
                "puts virtual tokens before a text. Use it alone. "
                f"Received: {str(path)!r} with {other[0]!r}"
            )
