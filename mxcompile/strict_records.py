"""Builds records from decoded JSON by their type hints, so that a damaged file is refused where it is read, by the name of its field.

Understood are dataclasses, TypedDicts (other keys are kept as they are), list, dict with string keys, Literal, unions, Any, None, bool,
int, float, str, and Annotated with a Rule, with NULL_IS_INFINITE or with a TypedDict that a plain dict must look like.

Numbers are finite and of a size that can be measured, so that what is computed of them is finite too; an int may stand for a float, a
bool never for a number.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from mxcompile.errors import MxcompileError

LARGEST_FLOAT = 1e75  # above what fp32 arithmetic gives, relative errors included; products of a few are finite in fp64
LARGEST_INT = 10**15  # also bytes of the largest machines; a float holds it exactly, and halves of it
DEEPEST = 64  # levels of what has no declared type
_SHOWN = 40  # characters of a wrong value

T = TypeVar("T")
_Reader = Callable[[Any], Any]


@dataclass(frozen=True)
class Rule:
    """What a value of the right type must be besides, in words that follow "must be". Rules are to have names: hints are evaluated
    where a lambda would not see its module."""

    text: str
    holds: Callable[[Any], bool]


NULL_IS_INFINITE = "null is infinite"
"""Marks a float that is written as null where it is not finite."""

NOT_EMPTY = Rule("a list that is not empty", bool)
Positive = Annotated[float, Rule("a number above 0", lambda value: value > 1e-30)]
NotNegative = Annotated[float, Rule("a number that is not negative", lambda value: value >= 0)]
Limit = Annotated[float, Rule("0 or a number above it", lambda value: value == 0 or value > 1e-30)]
Whole = Annotated[int, Rule("a whole number that is not negative", lambda value: value >= 0)]
Count = Annotated[int, Rule("a whole number above 0", lambda value: value > 0)]
OrInfinite = Annotated[float, NULL_IS_INFINITE]


def one_of(*words: str) -> Rule:
    """The value is one of these."""
    return Rule(f"one of {', '.join(words)}", lambda value: value in words)


class _Problem(Exception):
    """What is wrong with a value; the path to it grows on the way out."""

    def __init__(self, text: str, path: str = "") -> None:
        super().__init__(text)
        self.text, self.path = text, path


def read_record(cls: type[T], values: Any, again: str = "measure again") -> T:
    """`values` as a record of that dataclass; every field of the outermost record must be there, inner ones may lack those with defaults.

    Raises MxcompileError that names the field. `again`: what the user is to do then.
    """
    try:
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            if isinstance(values, dict) and field.name not in values:
                raise _Problem("is missing", f".{field.name}")
        hint: Any = cls
        record: T = _reader(hint)(values)
        return record
    except _Problem as problem:
        raise damaged(problem.path.removeprefix("."), problem.text, again) from None


def damaged(field: str, text: str, again: str = "measure again") -> MxcompileError:
    """What to say of a file with a wrong field."""
    where = f"{field}: " if field else ""
    return MxcompileError(f"{where}{text}; the file is damaged or of another version of mxcompile, {again}")


@functools.cache
def _reader(hint: Any) -> _Reader:
    """The function that reads values of a type."""
    simple = _SIMPLE.get(hint)
    if simple is not None:
        return simple
    if dataclasses.is_dataclass(hint):
        return _dataclass_reader(hint)
    if typing.is_typeddict(hint):
        return _typed_dict_reader(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _annotated_reader(*arguments)
    if origin is list:
        return _list_reader(_reader(arguments[0]))
    if origin is dict:
        return _dict_reader(_reader(arguments[1]))
    if origin is typing.Literal:
        return _annotated_reader(str, one_of(*arguments))
    if origin in (typing.Union, types.UnionType):
        return _union_reader([_reader(argument) for argument in arguments if argument is not type(None)], hint)
    raise TypeError(f"records with a {hint} cannot be read")


def _dataclass_reader(cls: Any) -> _Reader:
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = [field for field in dataclasses.fields(cls) if field.init]
    readers = {field.name: _reader(hints[field.name]) for field in fields}
    needed = [
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]

    def read(value: Any) -> Any:
        known = _object(value, needed)
        return cls(**{name: _at(f".{name}", readers[name], known[name]) for name in readers if name in known})

    return read


def _typed_dict_reader(cls: Any) -> _Reader:
    readers, needed = {}, []
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        optional = typing.get_origin(hint) is typing.NotRequired
        readers[name] = _reader(typing.get_args(hint)[0] if optional else hint)
        if not optional and name in cls.__required_keys__:
            needed.append(name)

    def read(value: Any) -> Any:
        known = _object(value, needed)
        return {name: _at(f".{name}", readers.get(name, _anything), item) for name, item in known.items()}

    return read


def _annotated_reader(base: Any, *marks: Any) -> _Reader:
    first = _reader(base)
    rules = [mark for mark in marks if isinstance(mark, Rule)]
    shapes = [_reader(mark) for mark in marks if typing.is_typeddict(mark)]
    infinite = NULL_IS_INFINITE in marks

    def read(value: Any) -> Any:
        if infinite and value is None:
            return math.inf
        value = first(value)
        for shape in shapes:
            value = shape(value)
        for rule in rules:
            if not rule.holds(value):
                raise _wrong(rule.text, value)
        return value

    return read


def _list_reader(item: _Reader) -> _Reader:
    def read(value: Any) -> Any:
        if not isinstance(value, list):
            raise _wrong("a list", value)
        return [_at(f"[{index}]", item, entry) for index, entry in enumerate(value)]

    return read


def _dict_reader(item: _Reader) -> _Reader:
    def read(value: Any) -> Any:
        return {name: _at(f".{name}", item, entry) for name, entry in _object(value).items()}

    return read


def _union_reader(choices: list[_Reader], hint: Any) -> _Reader:
    empty = type(None) in typing.get_args(hint)

    def read(value: Any) -> Any:
        if value is None and empty:
            return None
        for choice in choices[:-1]:
            try:
                return choice(value)
            except _Problem:
                continue
        return choices[-1](value)

    return read


def _object(value: Any, needed: list[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong("an object", value)
    for name in value:
        _string(name)
    for name in needed or ():
        if name not in value:
            raise _Problem("is missing", f".{name}")
    return value


def _at(place: str, read: _Reader, value: Any) -> Any:
    try:
        return read(value)
    except _Problem as problem:
        problem.path = place + problem.path
        raise


def _anything(value: Any, depth: int = 0) -> Any:
    """Any JSON that can be written again."""
    if depth > DEEPEST:
        raise _Problem(f"is nested more than {DEEPEST} levels deep")
    if isinstance(value, dict):
        inner = {f".{name}": item for name, item in _object(value).items()}
    elif isinstance(value, list):
        inner = {f"[{index}]": item for index, item in enumerate(value)}
    else:
        if isinstance(value, float) and not math.isfinite(value):
            raise _wrong("a finite number", value)
        return _string(value) if isinstance(value, str) else value
    for place, item in inner.items():
        _at(place, functools.partial(_anything, depth=depth + 1), item)
    return value


def _float(value: Any) -> float:
    if type(value) not in (float, int) or not -LARGEST_FLOAT <= value <= LARGEST_FLOAT:
        raise _wrong("a finite number of a sensible size", value)
    return float(value)


def _int(value: Any) -> int:
    if type(value) is not int or not -LARGEST_INT <= value <= LARGEST_INT:
        raise _wrong("a whole number of a sensible size", value)
    return value


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong("true or false", value)
    return value


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong("a text", value)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _wrong("a text of whole characters", value) from None
    return value


def _wrong(what: str, value: Any) -> _Problem:
    shown = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else None
    if isinstance(value, dict | list):
        shown = "an object" if isinstance(value, dict) else "a list" if value else "an empty list"
    text = shown or ascii(value)
    return _Problem(f"must be {what}, not {text if len(text) <= _SHOWN else text[:_SHOWN] + '...'}")


_SIMPLE: dict[Any, _Reader] = {Any: _anything, float: _float, int: _int, bool: _bool, str: _string}
