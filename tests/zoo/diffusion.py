"""Models that make images from noise."""

from zoo.case import Case

CASES: tuple[Case, ...] = ()
