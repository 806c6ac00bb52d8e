"""Every backbone and task class of keras-hub, as a tiny model.

`ZOO` maps the name of a class to its `Case`: how to build it, and what its
architecture says of its layers.
"""

from zoo.case import Case
from zoo.causal import CASES as CAUSAL
from zoo.diffusion import CASES as DIFFUSION
from zoo.encoders import CASES as ENCODERS
from zoo.multimodal import CASES as MULTIMODAL
from zoo.seq2seq import CASES as SEQ2SEQ
from zoo.vision import CASES as VISION
from zoo.vision_blocks import CASES as VISION_BLOCKS

ZOO: dict[str, Case] = {
    case.name: case
    for cases in (
        ENCODERS,
        SEQ2SEQ,
        CAUSAL,
        MULTIMODAL,
        VISION_BLOCKS,
        VISION,
        DIFFUSION,
    )
    for case in cases
}
