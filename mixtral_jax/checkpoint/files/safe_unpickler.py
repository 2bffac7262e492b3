"""Reads the pickle in a file of torch without running it.

A pickle is a program, and Python's unpickler runs whatever it asks for. This module has its own
interpreter, for just the instructions and names that describe a dictionary of tensors. It calls
nothing, imports nothing, and refuses everything else. It creates only dictionaries, lists, tuples,
numbers, text, and the two records below.
"""

import dataclasses
import pickletools
from collections.abc import Callable
from typing import Any

from mixtral_jax.config import ConfigError, require

# From torch's names of storages to dtypes.
_DTYPES = {"FloatStorage": "float32", "BFloat16Storage": "bfloat16", "HalfStorage": "float16"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = (
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


@dataclasses.dataclass(frozen=True)
class PickledStorage:
    """A storage: numbers that have their own entry in the archive."""

    key: str
    dtype: str
    num_numbers: int


@dataclasses.dataclass(frozen=True)
class PickledTensor:
    """A tensor within a storage; `start` and `strides` count numbers, not bytes."""

    storage: PickledStorage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Name:
    module: str
    name: str

    @property
    def dtype(self) -> str | None:
        return _DTYPES.get(self.name) if self.module == "torch" else None


_DICTIONARY, _TENSOR = (
    _Name("collections", "OrderedDict"),
    _Name("torch._utils", "_rebuild_tensor_v2"),
)


def read_tensors(pickle: bytes, where: str) -> dict[str, PickledTensor]:
    """The tensors that a pickle describes, by name; `where` names the pickle in error messages.

    Raises:
        ConfigError: the pickle is damaged, is not a dictionary of tensors, or asks for more than
            that.
    """
    try:
        found = _Interpreter(where).run(pickle)
    except ConfigError:
        raise
    except Exception as error:  # A damaged pickle can fail in many ways.
        raise ConfigError(
            f"{where} is damaged: {type(error).__name__}: {error}; copy the file again"
        ) from None
    fix = "save the weights as a dictionary of tensors, or as safetensors"
    require(
        isinstance(found, dict),
        f"{where} holds a {type(found).__name__}, not a dictionary of tensors: {fix}",
    )
    for name, tensor in found.items():
        require(
            name.isprintable(),
            f"{where}: the name {name!r} must consist of characters that can be printed: {fix}",
        )
        is_tensor = isinstance(tensor, PickledTensor)
        require(
            is_tensor, f"{where}: {name} is of type {type(tensor).__name__}, not a tensor: {fix}"
        )
    return found


class _Interpreter:
    def __init__(self, where: str):
        self._where = where
        self._stack: list[Any] = []
        self._memory: dict[int, Any] = {}
        self._steps: dict[str, Callable[[Any], None]] = {
            **dict.fromkeys(("PROTO", "FRAME"), lambda _: None),
            **dict.fromkeys(_LITERALS, self._stack.append),
            **{
                name: lambda _, value=value: self._stack.append(value)
                for name, value in _CONSTANTS.items()
            },
            "MARK": lambda _: self._stack.append(_MARK),
            "EMPTY_DICT": lambda _: self._stack.append({}),
            "EMPTY_LIST": lambda _: self._stack.append([]),
            "EMPTY_TUPLE": lambda _: self._stack.append(()),
            "TUPLE": lambda _: self._stack.append(tuple(self._pop_to_mark())),
            **{
                name: lambda _, size=size: self._stack.append(tuple(self._pop(size)))
                for name, size in _TUPLES.items()
            },
            "APPEND": lambda _: self._extend(self._pop(1)),
            "APPENDS": lambda _: self._extend(self._pop_to_mark()),
            "SETITEM": lambda _: self._set(self._pop(2)),
            "SETITEMS": lambda _: self._set(self._pop_to_mark()),
            "GLOBAL": lambda text: self._name(*text.split(" ")),
            "STACK_GLOBAL": lambda _: self._name(*self._pop(2)),
            "REDUCE": lambda _: self._call(*self._pop(2)),
            # Sets attributes that torch keeps beside the tensors of a module, which are not needed.
            "BUILD": lambda _: self._forget(),
            "BINPERSID": lambda _: self._refer(*self._pop(1)[0]),
            **dict.fromkeys(("BINPUT", "LONG_BINPUT"), self._remember),
            "MEMOIZE": lambda _: self._remember(len(self._memory)),
            **dict.fromkeys(
                ("BINGET", "LONG_BINGET"), lambda place: self._stack.append(self._memory[place])
            ),
        }

    def run(self, pickle: bytes) -> Any:
        for opcode, argument, position in pickletools.genops(pickle):
            if opcode.name == "STOP":
                return self._stack.pop()
            step = self._steps.get(opcode.name)
            if step is None:
                raise ConfigError(
                    f"{self._where}, byte {position}: the instruction {opcode.name} is refused, "
                    "since no tensor needs it: save the weights as safetensors"
                )
            step(argument)
        raise EOFError("there is no end")

    def _pop(self, size: int) -> list[Any]:
        values = self._stack[-size:]
        if len(values) < size or any(value is _MARK for value in values):
            raise IndexError("too few values")
        del self._stack[-size:]
        return values

    def _pop_to_mark(self) -> list[Any]:
        mark = max(place for place, value in enumerate(self._stack) if value is _MARK)
        values = self._stack[mark + 1 :]
        del self._stack[mark:]
        return values

    def _extend(self, values: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise TypeError("values are appended to something that is not a list")
        self._stack[-1].extend(values)

    def _set(self, pairs: list[Any]) -> None:
        keys, values = pairs[::2], pairs[1::2]
        if not isinstance(self._stack[-1], dict) or not all(isinstance(key, str) for key in keys):
            raise TypeError("a dictionary is needed, with keys that are text")
        self._stack[-1].update(zip(keys, values, strict=True))

    def _forget(self) -> None:
        self._pop(1)

    def _remember(self, place: int) -> None:
        self._memory[place] = self._stack[-1]

    def _name(self, module: str, name: str) -> None:
        named = _Name(module, name)
        is_known = named in (_DICTIONARY, _TENSOR) or named.dtype
        require(
            is_known,
            f"{self._where} asks for {module}.{name}, which is refused, since only tensors are "
            "read: save the weights as safetensors",
        )
        self._stack.append(named)

    def _call(self, named: Any, arguments: tuple[Any, ...]) -> None:
        if named == _DICTIONARY and arguments == ():
            self._stack.append({})
            return
        if named != _TENSOR:
            raise TypeError("a call of something that is not a function")
        storage, start, shape, strides, *_ = arguments
        numbers = (start, *shape, *strides)
        is_tensor = isinstance(storage, PickledStorage) and len(shape) == len(strides)
        if not is_tensor or not all(type(number) is int and number >= 0 for number in numbers):
            raise TypeError("a tensor with an impossible shape, start or strides")
        self._stack.append(PickledTensor(storage, start, tuple(shape), tuple(strides)))

    def _refer(self, kind: Any, named: Any, key: Any, _: Any, num_numbers: Any) -> None:
        dtype = named.dtype if kind == "storage" and isinstance(named, _Name) else None
        if not dtype or not isinstance(key, str) or type(num_numbers) is not int or num_numbers < 0:
            raise TypeError("a storage with an impossible type, key or size")
        self._stack.append(PickledStorage(key, dtype, num_numbers))
