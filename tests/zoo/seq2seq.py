"""Encoder-decoders of text and of sound."""

from zoo.case import Case

CASES: tuple[Case, ...] = ()
