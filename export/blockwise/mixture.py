"""Which layers go to 4 bits, and which had better stay at 8."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers that are stored alike, such as those of the same inputs.

    Attributes:
        paths: What `Linear` layers they are.
        bytes_at_4: Their size in 4 bits.
        bytes_at_8: Their size in 8 bits.
        loss: What the model loses when they alone go to 4 bits.
    """

    paths: tuple[str, ...]
    bytes_at_4: int
    bytes_at_8: int
    loss: float

    @property
    def price(self) -> float:
        """Loss per byte that 4 bits save."""
        return self.loss / (self.bytes_at_8 - self.bytes_at_4)


def in_4_bits(
    groups: Sequence[Group],
    budget: int | None = None,
    bound: float | None = None,
) -> list[Group]:
    """The groups to store in 4 bits; all others stay at 8.

    From all at 8 bits on, the group of the cheapest bytes is next, until the
    rest fits into `budget`; or as long as the losses add up to less than
    `bound`, as they roughly do while they are small.

    Args:
        groups: All groups of a model.
        budget: Bytes that all groups together may take.
        bound: What they may lose in all. One of the two is given.

    Raises:
        ValueError: If all in 4 bits take more than the budget.
    """
    if (budget is None) == (bound is None):
        raise ValueError(
            "Either a `budget` of bytes or a `bound` on the loss decides. "
            f"Received: budget={budget!r}, bound={bound!r}"
        )
    least = sum(group.bytes_at_4 for group in groups)
    if budget is not None and least > budget:
        raise ValueError(
            f"All layers in 4 bits take {least} bytes. Allow as many at least. "
            f"Received: budget={budget!r}"
        )
    chosen: list[Group] = []
    size, lost = sum(group.bytes_at_8 for group in groups), 0.0
    for group in sorted(groups, key=lambda group: group.price):
        lost += group.loss
        if budget is not None and size <= budget:
            break
        if bound is not None and lost > bound:
            break
        chosen.append(group)
        size -= group.bytes_at_8 - group.bytes_at_4
    return chosen
