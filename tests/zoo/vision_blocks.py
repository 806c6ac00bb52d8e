"""Vision models of transformer blocks."""

from zoo.case import Case

CASES: tuple[Case, ...] = ()
