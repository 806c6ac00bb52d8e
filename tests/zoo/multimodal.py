"""Models of text with images or sound."""

from zoo.case import Case

CASES: tuple[Case, ...] = ()
