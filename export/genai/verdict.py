"""Whether a stored model is still worth its fine-tuning."""

from keras_peft.export.genai import compare
from keras_peft.export.genai.compare import Scores


def warning(
    name: str, base: Scores | None, tuned: Scores, stored: Scores
) -> str:
    """What to tell a user whose fine-tuning the rounding outweighs, or `""`.

    Args:
        name: How the model is stored, such as `"int4"`.
        base: Scores of the model before it was tuned, if they are known.
        tuned: Of the same texts, by the tuned model in Keras.
        stored: By the file.
    """
    if base is None:
        return ""
    gained, _ = compare.difference(tuned, base)
    lost, error = compare.difference(tuned, stored)
    # Beyond what so few tokens leave open.
    if lost <= max(gained, 0.0) or lost <= 2 * error:
        return ""
    better = {
        "int4": "Pass `calibration`, train with `quantize_aware`, or store "
        "`quantize='int8'`.",
        "int8": "Store `quantize='float16'`.",
    }
    advice = better.get(name, "Store the model without `quantize`.")
    return (
        f"WARNING: {name} costs more than fine-tuning gained: it raises the "
        f"loss by {lost:.4f} ± {error:.4f}, which fine-tuning had lowered by "
        f"{gained:.4f}. {advice}"
    )
