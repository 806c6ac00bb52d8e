"""Turn a fine-tuned Keras model into a folder that runs on a device."""

from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

if TYPE_CHECKING:
    import keras

    from keras_peft.export.report import ExportReport
    from keras_peft.merge import MergeReport

__all__ = ["sum_adapters", "to_genai", "to_litert", "to_onnx", "verify"]


def to_onnx(
    model: "keras.Model",
    folder: str | Path,
    quantize: str | None = None,
    calibration: Any = None,
    tolerance: float | None = None,
    preprocessor: Any = None,
    labels: Sequence[str] | None = None,
    evaluation: tuple[Any, Any] | None = None,
    merge_report: "MergeReport | None" = None,
) -> "ExportReport":
    """Writes a folder that runs `model` without Keras, and checks it.

    The folder holds `model.onnx`, the tokenizer that trained and the settings
    around it, a manifest with hashes, a report, and a README with the code
    that runs exactly this model on ONNX Runtime. It appears whole or not at
    all; an older export of the same name is replaced.

    Before anything is written, the graph is run on other sizes than it was
    traced with and compared with Keras, and the tokenizer file is compared
    with the keras-hub layer on text in many scripts.

    Args:
        model: A built Keras model. Adapters that can be merged must be, with
            `keras_peft.merge`; active ones that cannot, such as
            `keras_peft.BottleneckAdapter`, become part of the graph.
        folder: Where to write. A new folder, or an older export.
        quantize: `None` for float32, `"float16"` for half the bytes, or
            `"int8"` for a quarter and more speed on processors.
        calibration: Real samples to check on: texts, an array, or a
            dictionary of arrays by input name.
        tolerance: Largest accepted difference from Keras, relative to the
            largest output. By default float32 must meet a bound derived from
            rounding, and a quantized model is measured and reported.
        preprocessor: A keras-hub preprocessor, tokenizer or image converter.
            By default `model.preprocessor`, where there is one. `False`
            leaves it out of the folder.
        labels: Names of the classes, in the order of the outputs.
        evaluation: `(inputs, labels)` to report accuracy on before and after
            each step. Inputs as for `calibration`; labels are class numbers.
        merge_report: What `keras_peft.merge` returned, to be shown in the
            report.

    Returns:
        An `ExportReport`; `print` shows size, latency and quality by step.

    Raises:
        ValueError: If an argument does not fit, the model carries adapters
            that can be merged, or a check fails. The folder is then as it was.
        ImportError: If `pip install keras-peft[export]` is missing.

    Example:
    ```python
    keras_peft.merge(classifier)
    report = keras_peft.export.to_onnx(
        classifier,
        "sentiment/",
        quantize="int8",
        labels=["negative", "positive"],
        evaluation=(test_texts, test_labels),
    )
    print(report)
    ```
    """
    from keras_peft.export import deploy

    return deploy.to_onnx(
        model,
        folder,
        quantize=quantize,
        calibration=calibration,
        tolerance=tolerance,
        preprocessor=preprocessor,
        labels=labels,
        evaluation=evaluation,
        merge_report=merge_report,
    )


def to_litert(
    model: "keras.Model",
    folder: str | Path,
    quantize: str | None = None,
    calibration: Any = None,
    tolerance: float | None = None,
    preprocessor: Any = None,
    labels: Sequence[str] | None = None,
    evaluation: tuple[Any, Any] | None = None,
    merge_report: "MergeReport | None" = None,
) -> "ExportReport":
    """Writes a folder that runs `model` on LiteRT, and checks it.

    LiteRT, once TensorFlow Lite, is the runtime of Android and of small
    devices. The folder holds `model.tflite` and, as `to_onnx` writes them,
    the tokenizer that trained, the settings around it, a manifest, a report
    and a README with code. It appears whole or not at all.

    The file needs the operators that every LiteRT runtime has, and no other.
    Sizes that the model leaves free stay free: `resize_tensor_input`, or a
    signature runner, sets them. Before anything is written, the file is run
    on other sizes than it was made with and compared with Keras.

    Args:
        model: A built Keras model, on any backend. Adapters that can be
            merged must be, with `keras_peft.merge`.
        folder: Where to write. A new folder, or an older export.
        quantize: `None` for float32, `"float16"` for half the bytes, or
            `"int8"` for a quarter: kernels and token tables in 8 bits, one
            scale per output or token, activations in floating point.
        calibration: Real samples to check on, as in `to_onnx`.
        tolerance: Largest accepted difference from Keras, as in `to_onnx`.
        preprocessor: A keras-hub preprocessor, tokenizer or image converter.
            By default `model.preprocessor`, where there is one. `False`
            leaves it out of the folder.
        labels: Names of the classes, in the order of the outputs.
        evaluation: `(inputs, labels)` to report accuracy on before and after
            each step, as in `to_onnx`.
        merge_report: What `keras_peft.merge` returned, to be shown in the
            report.

    Returns:
        An `ExportReport`; `print` shows size, latency and quality by step.

    Raises:
        ValueError: If an argument does not fit, the model carries adapters
            that can be merged, or a check fails. The folder is then as it was.
        ImportError: If `pip install keras-peft[litert]` is missing.
        TracingError: If the converter does not take the model.

    Example:
    ```python
    keras_peft.merge(classifier)
    report = keras_peft.export.to_litert(
        classifier, "sentiment/", quantize="int8"
    )
    print(report)
    ```
    """
    from keras_peft.export import deploy

    return deploy.to_litert(
        model,
        folder,
        quantize=quantize,
        calibration=calibration,
        tolerance=tolerance,
        preprocessor=preprocessor,
        labels=labels,
        evaluation=evaluation,
        merge_report=merge_report,
    )


def to_genai(
    model: "keras.Model",
    folder: str | Path,
    quantize: str | None = None,
    calibration: Sequence[str] | None = None,
    evaluation: Sequence[str] | None = None,
    tokenizer: Any = None,
    hf_folder: str | Path | None = None,
    context_length: int | None = None,
    adapters: Mapping[str, str | Path] | None = None,
) -> "ExportReport":
    """Writes a folder that onnxruntime-genai runs `model` from.

    For language models: with a cache of keys and values, on Android, iOS,
    Windows, Linux and macOS. The folder holds the graph and its weights,
    `genai_config.json`, the tokenizer that trained with its chat template, a
    manifest, a report, and a README with code. It appears whole or not at
    all.

    The graph is built from the Keras weights, of whatever backend, in the
    operators that ONNX Runtime is fastest with. An architecture that has no
    description here is traced instead, if it keeps keys and values as
    keras-hub does: without `calibration` and `adapters`, and for batches of
    equally long texts alone, as its report says. Before the folder appears, it
    is compared with Keras, fed step by step in float32 and as it is stored,
    and onnxruntime-genai must answer with the tokens of the graph.

    Args:
        model: A `keras_hub.models.CausalLM`. Adapters must have been merged,
            with `keras_peft.merge`.
        folder: Where to write. A new folder, or an older export.
        quantize: `None` for float32, `"float16"` for half the bytes,
            `"int8"` for blocks of 8-bit integers, or `"int4"` for 4 bits with
            the table of tokens and the head in 8.
        calibration: Texts like those the model was trained on. With them,
            integers are chosen that lose least on such texts.
        evaluation: Texts that were not trained on. The report then has the
            loss on them, before and after.
        tokenizer: What trained: a keras-hub preprocessor or tokenizer, or one
            of `transformers` or `tokenizers`. By default
            `model.preprocessor`.
        hf_folder: The Hugging Face folder that the model came from, whose
            chat template, end tokens, generation settings and context length
            are taken over.
        context_length: How many tokens a prompt and its answer may have. By
            default what the model or `hf_folder` tells, or else 2048.
        adapters: Folders of adapters trained on this very base, by the names
            they get: `{"formal": "formal-adapter/"}`, of `save_adapter` or
            Hugging Face PEFT. Each becomes a file `formal.onnx_adapter` of a
            few megabytes that the runtimes switch on for single requests;
            without it the base answers. Kernel changes of other methods than
            LoRA are converted; prompts and prefixes take the first tokens of
            the context. Low ranks on all layers slow an answer down, on
            queries, keys and values alone hardly; to ship one adapter alone,
            merge it.

    Returns:
        An `ExportReport`; `print` shows size, speed and loss by step.

    Raises:
        ValueError: If the architecture has neither a description nor a cache
            that can be traced, an argument does not fit, the model carries
            adapters, a weight is not finite, the tokenizer cannot be
            reproduced, or a check fails. The folder is then as it was.
        TracingError: If no tracer takes an architecture without description.
        OSError: If the disk has no room.
        ImportError: If `pip install keras-peft[genai]` is missing.

    Example:
    ```python
    keras_peft.merge(model)
    report = keras_peft.export.to_genai(
        model, "assistant/", quantize="int8", evaluation=test_texts
    )
    print(report)
    ```
    """
    from keras_peft.export.genai import deploy

    return deploy.to_genai(
        model,
        folder,
        quantize=quantize,
        calibration=calibration,
        evaluation=evaluation,
        tokenizer=tokenizer,
        hf_folder=hf_folder,
        context_length=context_length,
        adapters=adapters,
    )


def sum_adapters(
    files: Sequence[str | Path], weights: Sequence[float], file: str | Path
) -> None:
    """Writes the weighted sum of exported adapters as one more.

    The runtimes add no adapters up: of two that are active they take the
    first. `A` and `B` of all stand side by side, so the sum is exact and the
    ranks add up.

    Args:
        files: `.onnx_adapter` files of LoRA that `to_genai` wrote for one
            base.
        weights: A number for each; negative ones take a change back.
        file: The `.onnx_adapter` file to write.

    Raises:
        ValueError: If the files are of different bases, hold virtual tokens,
            or are damaged. Nothing is written then.
        ImportError: If `pip install keras-peft[genai]` is missing.

    Example:
    ```python
    keras_peft.export.sum_adapters(
        ["app/formal.onnx_adapter", "app/brief.onnx_adapter"],
        [1.0, 0.5],
        "app/formal-and-brief.onnx_adapter",
    )
    ```
    """
    from keras_peft.export.genai.checks import check_packages

    check_packages()
    from keras_peft.export.genai import adapter_file

    adapter_file.sum_files(files, weights, file)


def verify(
    folder: str | Path, model: "keras.Model", samples: Any = None
) -> "ExportReport":
    """Checks a folder again: later, elsewhere, after a copy.

    Every file is compared with the manifest, then the model in the folder is
    run in the runtime of this machine and compared with the Keras model.

    Args:
        folder: A folder that `to_onnx` or `to_litert` wrote.
        model: The Keras model it was exported from, as it was then.
        samples: Samples to compare on, as in `to_onnx`; made up by default.

    Returns:
        An `ExportReport` of this machine.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If it is not an export, files are missing or changed, or
            it computes something else than `model`.
    """
    from keras_peft.export import deploy

    return deploy.verify(folder, model, samples)
