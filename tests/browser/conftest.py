import sys
from pathlib import Path

# The site is made by scripts, which import each other by name.
sys.path.append(str(Path(__file__).parents[2] / "examples" / "browser"))
