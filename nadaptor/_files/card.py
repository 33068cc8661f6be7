"""Cards: what a checkpoint, a snapshot or a cell says of itself, under a digest.

A card is JSON. `seal` adds the format and a SHA-256 over everything else; `unseal` refuses a card
whose digest is another, so that no changed digit is believed. `fields_of` reads a card into a
dataclass and names the field that is missing or of another type.
"""

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

# 1: no format field; a snapshot's and a cell's card without a digest. 2: each has one.
FORMAT = 2
_DIGEST = "card_digest"
_SHOWN = 80
Record = TypeVar("Record")


class DamagedError(ValueError):
    """A card that is not what was written; the message says what is wrong, not where."""


def seal(card: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a card with its format and its digest.

    Example:
        >>> sorted(seal({"kind": "ann"}))
        ['card_digest', 'format', 'kind']
    """
    # As it is read back: keys that are numbers become text, by which the digest orders them.
    full = {**json.loads(json.dumps(card)), "format": FORMAT}
    full.pop(_DIGEST, None)  # of a card that was sealed before
    return {**full, _DIGEST: digest(full)}


def unseal(card: Any) -> dict[str, Any]:
    """Returns a card that is what was sealed; one of format 1 without a digest is believed.

    Raises:
        DamagedError: it is not, or it is of a later format.

    Example:
        >>> unseal({**seal({"accuracy": 0.9}), "accuracy": 0.99})
        Traceback (most recent call last):
        nadaptor._files.card.DamagedError: its digest is another
    """
    if type(card) is not dict:
        raise DamagedError("it is no mapping of fields")
    form = card.get("format", 1)
    if type(form) is int and form > FORMAT:
        raise DamagedError(f"it is of format {form}, and this version reads {FORMAT}: update it")
    if _DIGEST in card:
        if card[_DIGEST] != digest({k: v for k, v in card.items() if k != _DIGEST}):
            raise DamagedError("its digest is another")
    # Without a digest a card of today does not pass for one of format 1.
    elif "format" in card:
        raise DamagedError(f"it lacks {_DIGEST}")
    return card


def digest(value: Any) -> str:
    """Returns the SHA-256 of a value as JSON, whatever the order of its fields."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def fields_of(record: type[Record], card: Mapping[str, Any]) -> Record:
    """Reads the fields of a dataclass from a card; others are passed over.

    Args:
        record: a dataclass; its annotations say of which type a field must be.
        card: as JSON gives it.

    Returns:
        The record.

    Raises:
        DamagedError: a field without a default is missing, or one is of another type; the message
            names it.

    Example:
        >>> @dataclasses.dataclass
        ... class Point:
        ...     x: int
        >>> fields_of(Point, {"x": "3"})
        Traceback (most recent call last):
        nadaptor._files.card.DamagedError: its x is '3', which is no int
    """
    found, hints = {}, typing.get_type_hints(record)
    for field in dataclasses.fields(typing.cast(Any, record)):
        if field.name in card:
            _check_type(field.name, card[field.name], hints[field.name])
            found[field.name] = card[field.name]
        elif field.default is dataclasses.MISSING:
            raise DamagedError(f"it lacks {field.name}")
    return record(**found)


def first_difference(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Returns the first field, in the order of their names, in which two cards differ.

    Example:
        >>> first_difference({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4})
        'b'
    """
    for field in sorted(saved.keys() | wanted.keys()):
        if field not in saved or field not in wanted or saved[field] != wanted[field]:
            return field
    return None


def brief(value: Any) -> str:
    """Returns a value as a message may have it: printable, and short."""
    text = ascii(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _check_type(name: str, value: Any, wanted: Any) -> None:
    """Checks a value against int, float, str, bool, None, a union, list[...] or dict[str, ...]."""
    if isinstance(wanted, types.UnionType):
        for one in typing.get_args(wanted):
            try:
                return _check_type(name, value, one)
            except DamagedError:
                continue
        raise DamagedError(f"its {name} is {brief(value)}, which is no {wanted}")
    origin, inner = typing.get_origin(wanted) or wanted, typing.get_args(wanted)
    # A number that is whole may be written without a point.
    if wanted is Any or (origin is float and type(value) is int):
        return None
    # Not isinstance, to which True is an int.
    if type(value) is not origin:
        raise DamagedError(f"its {name} is {brief(value)}, which is no {origin.__name__}")
    for key, part in value.items() if origin is dict else enumerate(value) if inner else ():
        _check_type(f"{name}[{brief(key)}]", part, inner[-1])
    return None
