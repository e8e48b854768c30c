"""Say in few patterns which modules an export leaves unquantized.

Engines match each entry against module names (exact, or a prefix followed by `*`), so a pattern may never begin the name of
a quantized module.
"""
from collections.abc import Iterable, Iterator


def summarize_excluded(unquantized: Iterable[str], quantized: Iterable[str]) -> list[str]:
    """Sorted patterns that cover every name of `unquantized` and none of `quantized`, as Model Optimizer writes them.

    For each name its dotted prefixes are tried from the shortest: `prefix*`, then `prefix.*` (where a sibling's name merely
    continues the prefix), at last the name itself. A name that is also quantized is left out.
    """
    quantized = list(quantized)
    chosen = set()
    for name in unquantized:
        pattern = next((p for p in _candidates(name) if not _touches(p, quantized)), None)
        if pattern is not None:
            chosen.add(pattern)
    return sorted(chosen)


def _candidates(name: str) -> Iterator[str]:
    for i, letter in enumerate(name):
        if letter == ".":
            yield name[:i] + "*"
            yield name[:i] + ".*"
    yield name


def _touches(pattern: str, names: list[str]) -> bool:
    if not pattern.endswith("*"):
        return pattern in names
    if pattern.endswith(".*") and pattern[:-2] in names:   # the prefix itself is one of the modules that `prefix.*` stands for
        return True
    return any(name.startswith(pattern[:-1]) for name in names)
