"""Pickles read as data: a small pickle machine that builds containers, numbers and the objects of a closed list, and nothing else.

A pickle is a program that may call anything it can name (https://docs.python.org/3/library/pickle.html). Here names stand for entries
of a table that the caller gives, none of which is the object so named in Python: no module is imported and no code of the file, or of a
class it names, is ever executed. A name outside of the table ends the reading with that name.
"""
from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 STRING BINSTRING "
    "SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split())
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}
_IGNORED = ("PROTO", "FRAME", "STOP")


@dataclass
class Opaque:
    """An object that a file names and nobody needs: what it was called with, and the state it was given."""
    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def get(self, key: str, default: Any = None) -> Any:
        """What its state holds under a name."""
        return self.state.get(key, default) if isinstance(self.state, dict) else default


@dataclass(frozen=True)
class Name:
    """A name of the table, and what calling it builds from the arguments (None: an `Opaque`)."""
    name: str
    build: Callable[..., Any] | None = None

    def call(self, arguments: tuple[Any, ...]) -> Any:
        return Opaque(self.name, arguments) if self.build is None else self.build(*arguments)


Names = Mapping[str, Callable[..., Any] | None]


def read_pickle(data: bytes, names: Names, persistent: Callable[[Any], Any] | None = None) -> Any:
    """The object that a pickle of protocol 0 to 5 describes.

    names: "module.name" to a function that builds the object from the arguments it is called with, or None for one that is kept as an
    `Opaque`; persistent: for persistent ids. ValueError, naming it, for a name that is not in the table, and for a damaged pickle.
    """
    machine = _Machine(names, persistent)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.step(opcode.name, argument)
        (result,) = machine.stack
    except Refused:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"damaged pickle ({type(error).__name__}: {error})") from None
    return result


class Refused(ValueError):
    """A pickle asks for something that is not on the list."""


class _Machine:
    def __init__(self, names: Names, persistent: Callable[[Any], Any] | None):
        self.names, self.persistent = names, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in _LITERALS:
            self.stack.append(argument)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode])
        elif opcode in _EMPTY:
            self.stack.append(_EMPTY[opcode]())
        elif opcode not in _IGNORED:
            act = getattr(self, f"do_{opcode.lower()}", None)
            if act is None:
                raise Refused(f"the pickle uses {opcode}, which no file of weights needs")
            act(argument)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value should be")
        return value

    def pop_to_mark(self) -> list[Any]:
        found = len(self.stack) - 1 - self.stack[::-1].index(_MARK)
        values = self.stack[found + 1:]
        del self.stack[found:]
        return values

    # Containers -----------------------------------------------------------------------------------------------------------

    def do_mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def do_pop(self, _: Any) -> None:
        self.stack.pop()

    def do_pop_mark(self, _: Any) -> None:
        self.pop_to_mark()

    def do_dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def do_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def do_tuple1(self, _: Any) -> None:
        self.stack.append((self.pop(),))

    def do_tuple2(self, _: Any) -> None:
        last = self.pop()
        self.stack.append((self.pop(), last))

    def do_tuple3(self, _: Any) -> None:
        last, middle = self.pop(), self.pop()
        self.stack.append((self.pop(), middle, last))

    def do_list(self, _: Any) -> None:
        self.stack.append(self.pop_to_mark())

    def do_dict(self, _: Any) -> None:
        values = self.pop_to_mark()
        self.stack.append(dict(zip(values[::2], values[1::2], strict=True)))

    def do_frozenset(self, _: Any) -> None:
        self.stack.append(frozenset(self.pop_to_mark()))

    def do_append(self, _: Any) -> None:
        value = self.pop()
        _items_of(self.stack[-1]).append(value)

    def do_appends(self, _: Any) -> None:
        values = self.pop_to_mark()
        _items_of(self.stack[-1]).extend(values)

    def do_additems(self, _: Any) -> None:
        values = self.pop_to_mark()
        if not isinstance(self.stack[-1], set):
            raise ValueError("items for a set, and there is none")
        self.stack[-1].update(values)

    def do_setitem(self, _: Any) -> None:
        value = self.pop()
        self._set_items([self.pop(), value])

    def do_setitems(self, _: Any) -> None:
        self._set_items(self.pop_to_mark())

    def _set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Opaque):      # a dictionary of a kind that nobody needs
            target.items.extend(values)
        elif isinstance(target, dict):
            target.update(zip(values[::2], values[1::2], strict=True))
        else:
            raise ValueError("items for a dictionary, and there is none")

    # Memory ---------------------------------------------------------------------------------------------------------------

    def do_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def do_put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    do_binput = do_long_binput = do_put

    def do_get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    do_binget = do_long_binget = do_get

    # Names and what they build ----------------------------------------------------------------------------------------------

    def do_global(self, argument: str) -> None:
        self._push_name(argument.replace(" ", ".", 1))

    def do_stack_global(self, _: Any) -> None:
        name = self.pop()
        module = self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a name that is no text")
        self._push_name(f"{module}.{name}")

    def _push_name(self, name: str) -> None:
        if name not in self.names:
            raise Refused(f"the pickle asks for {name}, which is not on the list of what files of weights hold; nothing of it was "
                          "executed. Do not trust this file")
        self.stack.append(Name(name, self.names[name]))

    def do_reduce(self, _: Any) -> None:
        arguments = self.pop()
        self._call(self.pop(), arguments)

    do_newobj = do_reduce

    def do_newobj_ex(self, _: Any) -> None:
        keywords = self.pop()
        if keywords:
            raise ValueError("an object with keywords")
        self.do_reduce(None)

    def do_obj(self, _: Any) -> None:
        name, *arguments = self.pop_to_mark()
        self._call(name, tuple(arguments))

    def do_inst(self, argument: str) -> None:
        arguments = tuple(self.pop_to_mark())
        self.do_global(argument)
        self._call(self.pop(), arguments)

    def _call(self, name: Any, arguments: Any) -> None:
        if not isinstance(name, Name) or not isinstance(arguments, tuple):
            raise Refused(f"the pickle calls {type(name).__name__!r}, which is no name of the list")
        self.stack.append(name.call(arguments))

    def do_build(self, _: Any) -> None:
        state = self.pop()
        target = self.stack[-1]
        if isinstance(target, Opaque):
            target.state = state
        elif not isinstance(target, dict):      # OrderedDict carries an attribute of no meaning (_metadata of a state_dict)
            raise Refused(f"the pickle sets the state of {type(target).__name__!r}")

    def do_persid(self, argument: str) -> None:
        self.stack.append(argument)
        self.do_binpersid(None)

    def do_binpersid(self, _: Any) -> None:
        identity = self.pop()
        if self.persistent is None:
            raise Refused("the pickle refers to an object outside of it")
        self.stack.append(self.persistent(identity))


def _items_of(target: Any) -> list[Any]:
    if isinstance(target, list):
        return target
    if isinstance(target, Opaque):
        return target.items
    raise ValueError("items for a list, and there is none")
