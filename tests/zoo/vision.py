"""Convolutional backbones, detectors and segmenters."""

from zoo.case import Case

CASES: tuple[Case, ...] = ()
