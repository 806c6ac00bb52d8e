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
    def saved(self) -> int:
        """Bytes that 4 bits save."""
        return self.bytes_at_8 - self.bytes_at_4

    @property
    def price(self) -> float:
        """What they cost, per byte saved."""
        return self.loss / self.saved


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
    if bound is not None:
        return _while_cheap(groups, bound)
    return _until_small(groups, budget or 0)


def _while_cheap(groups: Sequence[Group], bound: float) -> list[Group]:
    chosen: list[Group] = []
    lost = 0.0
    for group in sorted(groups, key=lambda group: group.price):
        lost += group.loss
        if lost > bound:
            break
        chosen.append(group)
    return chosen


def _until_small(groups: Sequence[Group], budget: int) -> list[Group]:
    chosen: list[Group] = []
    room = budget - sum(group.bytes_at_8 for group in groups)
    for group in sorted(groups, key=lambda group: group.price):
        if room >= 0:
            break
        chosen.append(group)
        room += group.saved
    # The last of them may have made more room than was needed.
    for group in reversed(chosen.copy()):
        if group.saved <= room:
            chosen.remove(group)
            room -= group.saved
    return chosen
