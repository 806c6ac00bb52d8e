import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]
# The site is made by scripts, which import each other by name; what it is made
# of, other tests export.
sys.path += [
    str(_ROOT / "examples" / "browser"),
    str(_ROOT / "tests" / "export"),
    str(_ROOT / "tests" / "export" / "genai"),
]
