"""What outputs share: their fields by attribute, by key and by position, as transformers' outputs have them, and a short repr."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.core import Tracer


class Fields:
    """A struct whose fields that are not None can be had by key and by position, too; `dict(output)` has them all."""

    def __init_subclass__(cls) -> None:
        cls.__repr__ = Fields.__repr__  # before the dataclass writes one that prints every array

    def to_tuple(self) -> tuple[Any, ...]:
        """Returns the fields that are not None, in order."""
        return tuple(value for _, value in self.items())

    def items(self) -> tuple[tuple[str, Any], ...]:
        """Returns names and values of the fields that are not None."""
        fields: Any = self  # a dataclass, which this class alone is not
        named = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(fields))
        return tuple((name, value) for name, value in named if value is not None)

    def keys(self) -> tuple[str, ...]:
        """Returns the names of the fields that are not None."""
        return tuple(name for name, _ in self.items())

    def values(self) -> tuple[Any, ...]:
        """Returns the same as `to_tuple`."""
        return self.to_tuple()

    def __getitem__(self, key: str | int | slice) -> Any:
        """Returns a field by its name, or fields by their place among those that are not None."""
        if not isinstance(key, str):
            return self.to_tuple()[key]
        found = dict(self.items())
        if key not in found:
            raise KeyError(f"{type(self).__name__} has no {key!r} here; it has {', '.join(found)}.")
        return found[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, key: Any) -> bool:
        return key in self.keys()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={shown(value)}' for name, value in self.items())})"


def shown(value: Any) -> str:
    """Returns a number or a text as it is, an array as its dtype and shape, and equal things in a row as their number and one."""
    if isinstance(value, tuple) and value and not isinstance(value[0], str):
        each = [shown(one) for one in value]
        alike = len(each) > 1 and len(set(each)) == 1
        return f"{len(each)} x {each[0]}" if alike else f"({', '.join(each)})"
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if dtype is None or shape is None:
        return repr(value)
    if shape == () and isinstance(value, (jax.Array, np.ndarray, np.generic)) and not isinstance(value, Tracer):
        return f"{value.item():.5g}"
    return f"{dtype}[{', '.join(map(str, shape))}]"
