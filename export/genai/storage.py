"""How the numbers of a layer or a table are stored in the file."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keras_peft.export.blockwise import Blockwise


@dataclasses.dataclass(frozen=True)
class Float:
    """Floating point: `"float32"`, or `"float16"` for half the bytes."""

    dtype: str = "float32"


# By the path of a layer; what is not in it is stored as float32.
Plan = Mapping[str, "Float | Blockwise"]
