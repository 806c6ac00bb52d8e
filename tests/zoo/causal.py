"""Decoders and their language models."""

from zoo.case import Case

CASES: tuple[Case, ...] = ()
