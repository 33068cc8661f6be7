"""Interprets the pickles that torch writes, and no others: numbers, text, containers and tensors.

A pickle is a program for a machine with a stack. This machine has the instructions that
`torch.save` writes, and each of them builds a value: none imports, calls or sets an attribute of
anything that the file names. Keys are text or numbers, checked before they are hashed, so that
nothing here recurses into what a file nests; the count of instructions and of letters is limited,
so that neither time nor memory depends on more than the file's size.
"""

import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
# A tensor takes about 40 instructions: this is for 25,000 of them, in about two seconds.
MAX_INSTRUCTIONS = 2**20
MAX_TEXT = 2**24
# A key below this is its own hash: a file cannot choose keys that collide.
_MAX_KEY = 2**60
_MAX_LONG = 16
_MAX_AXES = 32
_SHOWN = 80


class RefusedError(ValueError):
    """What a file asks for and does not get, as one readable line."""


class Storage(NamedTuple):
    """A flat run of numbers in the file."""

    key: str
    kind: str
    size: int

    @property
    def dtype(self) -> np.dtype:
        """Of its numbers."""
        return DTYPES[self.kind]


class Tensor(NamedTuple):
    """A strided view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Pickled(NamedTuple):
    """What a pickle holds."""

    value: Any
    storages: Mapping[str, Storage]  # those that it names
    end: int  # the byte after it


class _Global(NamedTuple):
    """A name that stands for a builder below, or for the kind of a storage."""

    name: str


def shown(name: object) -> str:
    """Returns a name from a file as a message may have it: printable ASCII, and short.

    Example:
        >>> shown("a\\x1b[31m")
        'a\\\\x1b[31m'
    """
    text = ascii(str(name)[: _SHOWN + 1])[1:-1]
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def load_pickle(data: bytes, start: int = 0) -> Pickled:
    """Interprets the pickle that begins at a byte.

    Args:
        data: of which the pickle is a part.
        start: its first byte.

    Returns:
        The value, in which a tensor is a `Tensor` and an ordered dictionary a dict; the storages;
        and where it ends.

    Raises:
        RefusedError: it holds something else, is damaged, or is longer than any of torch's.

    Example:
        >>> load_pickle(b"\\x80\\x02K\\x03.").value
        3

    Source: pickletools.py of CPython for the instructions; torch/serialization.py and
    torch/_utils.py of PyTorch for the names.
    """
    machine = _Machine(data, start)
    try:
        return Pickled(machine.run(), machine.storages, machine.position)
    except (LookupError, ValueError, TypeError, AttributeError, OverflowError) as error:
        if isinstance(error, RefusedError):
            raise
        where = f"at byte {machine.position - start} of its pickle"
        raise RefusedError(f"it is truncated or damaged, {where}") from error


class _Machine:
    """The stack, the memo and the place in the file."""

    def __init__(self, data: bytes, position: int) -> None:
        self.data, self.position = data, position
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.text_left = MAX_TEXT

    def run(self) -> Any:
        for _ in range(MAX_INSTRUCTIONS):
            code = self.take(1)
            if code == b".":
                return self.stack.pop()
            if push := _PUSH.get(code):
                self.stack.append(push(self))
            elif act := _ACT.get(code):
                act(self)
            else:
                raise RefusedError(f"its pickle holds {code!r}, which torch does not write")
        raise RefusedError(
            f"its pickle has more than {MAX_INSTRUCTIONS} instructions; save a plain state dict"
        )

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.position:
            raise RefusedError("it is truncated or damaged, in its pickle")
        self.position += size
        return self.data[self.position - size : self.position]

    def line(self) -> bytes:
        end = self.data.index(b"\n", self.position, self.position + MAX_TEXT)
        return self.raw(end + 1 - self.position)[:-1]

    def digits(self) -> bytes:
        line = self.line()
        return line if len(line) <= _SHOWN else b""

    def number(self, size: int, *, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def long(self, size: int) -> int:
        if size > _MAX_LONG:
            raise RefusedError(f"it holds a number of {size} bytes")
        return self.number(size, signed=True)

    def raw(self, size: int) -> bytes:
        # Before it is read: a file may state any length.
        self.text_left -= size
        if self.text_left < 0:
            raise RefusedError(f"it holds more than {MAX_TEXT} letters; save a plain state dict")
        return self.take(size)

    def text(self, size: int) -> str:
        return self.raw(size).decode("utf-8", "surrogatepass")

    def pop_marked(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def pop_tuple(self, size: int) -> tuple[Any, ...]:
        start = len(self.stack) - size
        if start < 0:
            raise IndexError("its stack is empty")
        items = tuple(self.stack[start:])
        del self.stack[start:]
        return items

    def stack_global(self) -> _Global:
        module, name = self.pop_tuple(2)
        return _known(_of(str, module), _of(str, name))

    def storage(self) -> Storage:
        tag, kind, key, _, size, *view = _of(tuple, self.stack.pop())
        if type(kind) is not _Global or kind.name not in DTYPES or tag != "storage":
            raise RefusedError("it holds a storage of an unknown kind")
        if any(part is not None for part in view):
            raise RefusedError("it holds a storage that is a part of another")
        found = Storage(_of(str, key), kind.name, count(size))
        if self.storages.setdefault(found.key, found) != found:
            raise RefusedError(f"it describes its storage {shown(key)} in two ways")
        return found

    def reduce(self) -> Any:
        function, arguments = self.pop_tuple(2)
        if type(function) is not _Global or function.name not in _BUILDERS:
            raise RefusedError("it calls something that is no function")
        return _BUILDERS[function.name](*_of(tuple, arguments))

    def put(self, index: int) -> None:
        # A dict: in a list, an index of the file's could be as large as memory.
        self.memo[index] = self.stack[-1]

    def extend(self, items: list[Any]) -> None:
        _of(list, self.stack[-1]).extend(items)

    def update(self, items: list[Any]) -> None:
        _update(_of(dict, self.stack[-1]), items)

    def build(self) -> None:
        # The attributes of a state dict are its versions: nothing of an array depends on them.
        self.stack.pop()
        _of(dict, self.stack[-1])


def count(value: Any) -> int:
    """Returns a size, stride or offset.

    Raises:
        RefusedError: it is none.
    """
    if type(value) is not int or not 0 <= value < 2**63:
        what = repr(value) if type(value) in (int, float) else type(value).__name__
        raise RefusedError(f"it holds a size, stride or offset that is no count: {what}")
    return value


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise RefusedError(
            f"it has {shown(type(value).__name__)} where torch writes {kind.__name__}"
        )
    return value


def _update(mapping: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
    """Sets keys and values in turn."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int):
            raise RefusedError(f"it holds a mapping with a key of {shown(type(key).__name__)}")
        if type(key) is int and abs(key) >= _MAX_KEY:
            raise RefusedError("it holds a mapping with a key of more than 60 bits")
        mapping[key] = value
    return mapping


def _known(module: str, name: str) -> _Global:
    if module == "torch" and name in DTYPES:
        return _Global(name)
    if f"{module}.{name}" in _BUILDERS:
        return _Global(f"{module}.{name}")
    raise RefusedError(
        f"it asks for {shown(f'{module}.{name}')}, and only tensors and ordered dictionaries are "
        "built; save a plain state dict, or use .safetensors"
    )


def _ordered(pairs: Iterable[Any] = ()) -> dict[Any, Any]:
    """An ordered dictionary: empty, or of pairs, as Python 2 pickles it."""
    mapping: dict[Any, Any] = {}
    for pair in _of(list, pairs) if pairs != () else ():
        _update(mapping, list(pair) if type(pair) in (list, tuple) else [pair])
    return mapping


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    axes, steps = _of(tuple, shape), _of(tuple, strides)
    if type(storage) is not Storage or len(axes) != len(steps) or len(axes) > _MAX_AXES:
        raise RefusedError("it holds a tensor without a storage, or with too few strides")
    return Tensor(storage, count(offset), tuple(map(count, axes)), tuple(map(count, steps)))


_BUILDERS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
}
# Protocol 0 has its booleans as numbers of two digits.
_BOOLS = {b"00": False, b"01": True}
# Instructions that put a value on the stack.
_PUSH: Mapping[bytes, Callable[[_Machine], Any]] = {
    b"N": lambda m: None,
    b"\x88": lambda m: True,
    b"\x89": lambda m: False,
    b"I": lambda m: _BOOLS[text] if (text := m.digits()) in _BOOLS else int(text),
    b"K": lambda m: m.number(1),
    b"M": lambda m: m.number(2),
    b"J": lambda m: m.number(4, signed=True),
    b"L": lambda m: int(m.digits().rstrip(b"L")),
    b"\x8a": lambda m: m.long(m.number(1)),
    b"\x8b": lambda m: m.long(m.number(4)),
    b"F": lambda m: float(m.digits()),
    b"G": lambda m: struct.unpack(">d", m.take(8))[0],
    b"U": lambda m: m.text(m.number(1)),
    b"T": lambda m: m.text(m.number(4)),
    b"V": lambda m: m.line().decode("raw-unicode-escape"),
    b"\x8c": lambda m: m.text(m.number(1)),
    b"X": lambda m: m.text(m.number(4)),
    b"C": lambda m: m.raw(m.number(1)),
    b"B": lambda m: m.raw(m.number(4)),
    b"}": lambda m: {},
    b"]": lambda m: [],
    b")": lambda m: (),
    b"d": lambda m: _update({}, m.pop_marked()),
    b"l": lambda m: m.pop_marked(),
    b"t": lambda m: tuple(m.pop_marked()),
    b"\x85": lambda m: m.pop_tuple(1),
    b"\x86": lambda m: m.pop_tuple(2),
    b"\x87": lambda m: m.pop_tuple(3),
    b"g": lambda m: m.memo[int(m.digits())],
    b"h": lambda m: m.memo[m.number(1)],
    b"j": lambda m: m.memo[m.number(4)],
    b"c": lambda m: _known(m.line().decode(), m.line().decode()),
    b"\x93": lambda m: m.stack_global(),
    b"Q": lambda m: m.storage(),
    b"R": lambda m: m.reduce(),
}
# Instructions that change what is there.
_ACT: Mapping[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: m.take(1),
    b"\x95": lambda m: m.take(8),
    b"(": lambda m: m.marks.append(len(m.stack)),
    b"0": lambda m: m.stack.pop(),
    b"p": lambda m: m.put(int(m.digits())),
    b"q": lambda m: m.put(m.number(1)),
    b"r": lambda m: m.put(m.number(4)),
    b"\x94": lambda m: m.put(len(m.memo)),
    b"a": lambda m: m.extend([m.stack.pop()]),
    b"e": lambda m: m.extend(m.pop_marked()),
    b"s": lambda m: m.update([*m.pop_tuple(2)]),
    b"u": lambda m: m.update(m.pop_marked()),
    b"b": lambda m: m.build(),
}
