"""What differs from a Hugging Face model, and how to mend it."""

import dataclasses
from collections.abc import Callable
from collections.abc import Iterable

# Mended where the value is no setting of the model's class.
IN_MEMORY = "mended, which a `.keras` file does not keep: mend again on loading"


@dataclasses.dataclass(frozen=True)
class Finding:
    """A difference between a model and the folder that it comes from.

    Attributes:
        text: What differs, as a sentence without a full stop.
        mend: Makes the model do as the folder says; `None` if nothing can.
        after: What is to be said once it is mended.
    """

    text: str
    mend: Callable[[], None] | None = None
    after: str = "mended"


def report(findings: Iterable[Finding], mend: bool) -> list[str]:
    """The sentences; mends what can be."""
    told = []
    for finding in findings:
        if mend and finding.mend is not None:
            finding.mend()
            told.append(f"{finding.text}; {finding.after}")
        else:
            told.append(finding.text)
    return told
