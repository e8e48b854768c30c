"""Trees of arrays: dictionaries, lists, tuples and named tuples, None, and whatever JAX knows to be a node (dataclasses, modules of its
libraries) where the user has imported it."""
from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from copy import copy
from typing import Any, NamedTuple


class Node(NamedTuple):
    names: Sequence[Any]
    values: Sequence[Any]
    rebuild: Callable[[list[Any]], Any]      # of new values


def is_tree(x: Any) -> bool:
    """Lists of numbers are arrays."""
    return node_of(x) is not None


def map_leaves(function: Callable[[str, Any], Any], tree: Any, path: str = "") -> Any:
    """The same tree with function(path, leaf) in the place of each leaf. Paths: keys, indices and fields, joined by dots."""
    node = node_of(tree)
    if node is None:
        return function(path, tree)
    paths = [f"{path}.{name}" if path else str(name) for name in node.names]
    return node.rebuild([map_leaves(function, value, below) for below, value in zip(paths, node.values)])


def node_of(x: Any) -> Node | None:
    """None: a leaf."""
    if x is None:
        return Node((), (), lambda values: None)
    if type(x) not in (dict, list, tuple) and not hasattr(x, "dtype"):
        node = _registered(x)
        if node is not None:
            return node
    if isinstance(x, Mapping):
        return Node(list(x), list(x.values()), lambda values: _mapping_like(x, values))
    if isinstance(x, (list, tuple)) and not (x and _is_numbers(x)):
        names = getattr(x, "_fields", range(len(x)))
        return Node(names, x, lambda values: type(x)(*values) if hasattr(x, "_fields") else type(x)(values))
    return None


def _registered(x: Any) -> Node | None:
    """A node by JAX's registry."""
    jax = sys.modules.get("jax")
    if jax is None:
        return None
    pairs, structure = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda node: node is not x)
    if len(pairs) == 1 and pairs[0][1] is x:
        return None
    names = [next(getattr(path[0], word) for word in ("name", "key", "idx") if hasattr(path[0], word)) for path, _ in pairs]
    return Node(names, [value for _, value in pairs], structure.unflatten)


def _mapping_like(x: Mapping[Any, Any], values: list[Any]) -> Any:
    """A copy keeps what a constructor may not take: the factory of a defaultdict, say."""
    made = copy(x) if isinstance(x, MutableMapping) else dict(x)
    made.update(zip(list(x), values))
    return made


def _is_numbers(x: Any) -> bool:
    return all(_is_numbers(item) if isinstance(item, (list, tuple)) else isinstance(item, (int, float)) for item in x)
