"""How a string names layers by their paths."""

import difflib
import re
from collections.abc import Iterable


def check_pattern(pattern: str) -> None:
    """Raises a `ValueError` if `pattern` is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            "Expected a layer name or a regular expression over layer paths, "
            f"but it does not parse: {error}. Received: {pattern!r}"
        ) from error


def path_matches(pattern: str, path: str) -> bool:
    """Whether `pattern` matches all of `path`, or all after one of its dots.

    `query` and `attention.query` both match `block.0.attention.query`.
    """
    return re.fullmatch(rf"(.*\.)?({pattern})", path) is not None


def lies_in(path: str, holders: Iterable[str]) -> bool:
    """Whether `path` is one of `holders`, or lies below one."""
    return any(path == h or path.startswith(h + ".") for h in holders)


def nearest(word: str, words: Iterable[str]) -> str:
    """`" Did you mean 'query'?"`, or nothing where no word is near."""
    near = difflib.get_close_matches(word, set(words), n=3, cutoff=0.6)
    if not near:
        return ""
    return f" Did you mean {' or '.join(repr(w) for w in near)}?"
