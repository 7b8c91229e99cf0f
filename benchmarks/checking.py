"""The two processes of a check: one holds the program, the other its tests. sandbox.py starts both.

    python -I checking.py program|tests FD        FD: the socket that joins them

The tests run where no code of the program ever does. A function of the program is there a stand-in
that sends its arguments through the socket as text and gets back the result as text: plain data,
whose comparison is Python's own. So whatever the program does in its process, to frames, builtins,
asserts or the socket, it can do no more than return values; it passes if these are right. What to
run comes through standard input. It uses the standard library alone: `python -I` finds no other.
"""
from __future__ import annotations

import builtins
import importlib
import io
import json
import os
import runpy
import sys
from collections.abc import Iterable, Iterator
from numbers import Complex, Integral, Real
from pathlib import Path
from types import CodeType
from typing import Any, BinaryIO, Callable

PASSED, FAILED, NOT_CONFINED = 10, 11, 12   # how the process of the tests ends
LONGEST = 2**26                             # bytes of one message
START, LOOK_UP, GET, SET = range(4)         # the objects that a program's process starts with

# ---------------------------------------------------------------------------------------------
# Values as text

COLLECTIONS: dict[str, Callable[[Any], Any]] = {
    "list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "iterator": iter,
}
TYPES = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)}


def encode(value: Any, number_of: Callable[[Any], int]) -> Any:
    """Return a value as JSON. number_of: the number of an object that is no data, or TypeError."""
    # What a subclass adds stays behind: a Counter is a dict over there, a number of NumPy's plain.
    if type(value).__module__ == "numpy" and value.shape == ():
        value = value.item()
    if value is None or isinstance(value, (bool, str)):
        return str.__str__(value) if isinstance(value, str) else value
    if isinstance(value, Integral):
        return {"int": hex(int(value))}
    if isinstance(value, Real):
        return {"float": float(value).hex()}
    if isinstance(value, Complex):
        number = complex(value)
        return {"complex": [number.real.hex(), number.imag.hex()]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    if isinstance(value, dict):
        return {"dict": [[encode(part, number_of) for part in item] for item in value.items()]}
    for name, kind in COLLECTIONS.items():
        if isinstance(value, Iterator if kind is iter else kind):
            return {name: [encode(part, number_of) for part in value]}
    if isinstance(value, type) and TYPES.get(value.__name__) is value:
        return {"type": value.__name__}
    return {"object": number_of(value)}


def decode(value: Any, object_of: Callable[[int], Any]) -> Any:
    """Return what `encode` was given; any exception if it is nothing of that."""
    if not isinstance(value, dict):
        return value
    (name, content), = value.items()
    if name in COLLECTIONS:
        return COLLECTIONS[name]([decode(part, object_of) for part in content])
    if name == "dict":
        return {decode(key, object_of): decode(part, object_of) for key, part in content}
    if name == "complex":
        return complex(*map(float.fromhex, content))
    return {
        "int": lambda text: int(text, 16), "float": float.fromhex, "bytes": bytes.fromhex,
        "type": TYPES.__getitem__, "object": object_of,
    }[name](content)


# ---------------------------------------------------------------------------------------------
# The program's process

def serve(text: str, channel: BinaryIO) -> None:
    """Do what the tests ask for: run the program, look up a name of it, call a function."""
    namespace: dict[str, Any] = {"__name__": "__main__"}

    def start() -> None:
        """Run it; its names stay."""
        exec(compile(text, "program", "exec"), namespace)

    objects: list[Any] = [start, namespace.__getitem__, getattr, setattr]

    def number_of(value: Any) -> int:
        """Keep an object for the tests."""
        objects.append(value)
        return len(objects) - 1

    for line in channel:
        number, arguments, named = json.loads(line)
        try:
            arguments = decode(arguments, objects.__getitem__)
            named = decode(named, objects.__getitem__)
            said = ["returned", encode(objects[number](*arguments, **named), number_of)]
        except Exception as error:
            names = [kind.__name__ for kind in type(error).__mro__]
            said = ["raised", next(name for name in names if name in TYPES)]
        channel.write(json.dumps(said).encode() + b"\n")
        channel.flush()


# ---------------------------------------------------------------------------------------------
# The tests' process

class Remote:
    """Something in the program's process that is no data: called, read and set over there."""

    def __init__(self, ask: Callable[..., Any], number: int) -> None:
        vars(self).update(_ask=ask, _number=number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._ask(self._number, arguments, named)

    def __getattr__(self, name: str) -> Any:
        return self._ask(GET, (self, name), {})

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask(SET, (self, name, value), {})


def number_of(value: Any) -> int:
    """Return the number of a stand-in; nothing else of this process is handed to the program."""
    if type(value) is not Remote:
        raise TypeError(f"{type(value).__name__} cannot be handed to a program")
    return vars(value)["_number"]


def asker(channel: BinaryIO) -> Callable[..., Any]:
    """Return the function that has the program's process call an object of its own."""

    def ask(number: int, arguments: tuple = (), named: dict[str, Any] | None = None) -> Any:
        """Return what it returns, or raise what it raises."""
        message = [number, encode(arguments, number_of), encode(named or {}, number_of)]
        channel.write(json.dumps(message).encode() + b"\n")
        channel.flush()
        line = channel.readline(LONGEST)
        if not line.endswith(b"\n"):
            os._exit(FAILED)  # at an end, or without one: no `except` of the tests may hide that
        how, said = json.loads(line)
        if how == "returned":
            return decode(said, lambda number: Remote(ask, number))
        # StopIteration would end a loop of the tests early, as if all were well.
        kind = TYPES[said]
        is_error = issubclass(kind, Exception) and kind is not StopIteration
        raise kind() if is_error else RuntimeError(said)

    return ask


class Names(dict):
    """The names that the tests see: their own, those asked for, Python's, the program's others."""

    def __init__(self, ask: Callable[..., Any], asked: Iterable[str]) -> None:
        super().__init__(__name__="__main__")
        self.ask = ask
        self.asked = set(asked)

    def __missing__(self, name: str) -> Any:
        if name not in self.asked:
            if hasattr(builtins, name):
                raise KeyError(name)  # Python looks there next
            if name in sys.stdlib_module_names:
                return importlib.import_module(name)
        return self.ask(LOOK_UP, (name,))


def complete(opening: str) -> CodeType:
    """Return the code of a text that may end at a function's head or docstring."""
    try:
        return compile(opening, "opening", "exec")
    except SyntaxError:
        return compile(f"{opening}    pass", "opening", "exec")


def test(task: dict[str, Any], channel: BinaryIO) -> None:
    """Have the program run, then run its tests; any exception if one of them fails."""
    ask = asker(channel)
    names = Names(ask, task["asked"])
    ask(START)
    # Helpers that the question gives are taken from there, not from the program.
    exec(complete(task["opening"]), names)
    for name in task["asked"]:
        names.pop(name, None)   # what the opening begins, the program has finished
    exec(compile(task["checks"], "checks", "exec"), names)


def main(role: str, descriptor: int) -> int:
    """Return how to end: PASSED, if these are the tests and they do."""
    # By its path: with this folder among Python's, a program would import what stands in it.
    confined = runpy.run_path(str(Path(__file__).with_name("confined.py")))
    task = json.load(sys.stdin)
    channel = io.BufferedRWPair(open(descriptor, "rb", 0), open(os.dup(descriptor), "wb", 0))
    is_program = role == "program"
    try:
        if not is_program:
            confined["hide"]()
        elif os.geteuid() == 0:
            confined["give_up_root"]()
        confined["confine"](**task["limits"])
    except OSError:
        return NOT_CONFINED
    try:
        if is_program:
            serve(task["program"], channel)
        else:
            test(task, channel)
    except BaseException:  # SystemExit too: not come to the end
        return FAILED
    return FAILED if is_program else PASSED


if __name__ == "__main__":
    os._exit(main(sys.argv[1], int(sys.argv[2])))  # at once: no handler registered by anyone runs
