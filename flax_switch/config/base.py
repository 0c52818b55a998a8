"""What every config dataclass shares: it checks the types of its fields, and its errors name the nearest setting."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import html
import numbers
import types
import typing
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from flax_switch.config.ranges import Range, refusal, shown


class ConfigError(ValueError):
    """A setting that cannot be used: the message says what was expected, what came and what to change."""


def check(condition: Any, message: str) -> None:
    """Raises `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def expect(name: str, value: Any, kinds: type | tuple[type, ...], instead: str) -> None:
    """Raises `ConfigError` unless a value is of one of the kinds; `instead` is a sentence on what to give."""
    wanted = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
    check(isinstance(value, kinds), f"{name} must be of type {wanted}; it is of type {type(value).__name__}. {instead}")


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises unless `value` is one of `allowed`, and suggests the nearest."""
    if value in allowed:
        return
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}; it is {shown(value)}.{hint}")


def one_line(error: BaseException) -> str:
    """Returns what another library's error says, as part of a sentence: on one line, and not longer than is of use."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


def may_change(default: Any) -> Any:
    """Declares a field, or a section given by its class, in which a resumed run may differ from the one it continues."""
    value: Any = {"default_factory" if isinstance(default, type) else "default": default}
    return dataclasses.field(**value, metadata={"may_change": True})


@dataclasses.dataclass(frozen=True)
class _Section:
    """What all config dataclasses share: checked types and ranges, replace, to and from plain dicts, errors that name a key."""

    kind: ClassVar[str | None] = None  # what a whole run's config says it is for, in files (`flax_switch.config.kinds`)
    section: ClassVar[str | None] = None  # what errors put before a field's name

    def __init_subclass__(cls) -> None:
        cls.__repr__ = cls.__repr__  # in its own dict, so that the dataclass does not write one with every field

    def __repr__(self) -> str:
        """Returns the call that makes it, with what differs from the defaults."""
        return f"{type(self).__name__}({_arguments(differences(self, None))})"

    def _repr_html_(self) -> str:
        """Returns the same for a notebook, over a folded table of every field; what is not the default is bold there."""
        differing = differences(self, None)
        names = {f.name: f"<b>{f.name}</b>" if f.name in differing else f.name for f in dataclasses.fields(self)}
        rows = "".join(f"<tr><td>{shown}</td><td>{_as_html(getattr(self, name))}</td></tr>" for name, shown in names.items())
        table = f"<details><summary>every field</summary><table>{rows}</table></details>"
        return f"<div><code>{html.escape(repr(self))}</code>{table}</div>"

    if not TYPE_CHECKING:  # type checkers know the fields from each class

        def __new__(cls, *values: Any, **named: Any) -> Self:
            """Refuses an unknown keyword before the constructor does, and names the nearest one."""
            reject_unknown_keys(cls, named)
            return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in _type_hints(type(self)):
            value = getattr(self, name)
            if value is not getattr(type(self), name, _Section):  # a default fits, and most values are defaults
                self.check_field(name, value)

    @classmethod
    def check_field(cls, name: str, value: Any) -> None:
        """Raises `ConfigError` unless the value has the field's type, and every number in it lies in the field's range."""
        check_value(name if cls.section is None else f"{cls.section}.{name}", value, _type_hints(cls)[name])

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with some fields changed; validated again."""
        reject_unknown_keys(type(self), changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Returns a plain, JSON-able dict of every field (tuples become lists, sections become dicts)."""

        def plain(value: Any) -> Any:
            if isinstance(value, _Section):
                return value.to_dict()
            return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

        values = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return values if self.kind is None else {"kind": self.kind, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Returns the inverse of `to_dict`. Unknown keys are errors that name the nearest; absent ones take defaults."""
        check(isinstance(values, Mapping), f"{cls.section or cls.__name__} must be fields by name; it is {shown(values)}.")
        if cls.kind is not None:
            one_of("kind", values.get("kind", cls.kind), (cls.kind,))
            values = {key: value for key, value in values.items() if key != "kind"}
        reject_unknown_keys(cls, values)
        sections = {f.name: f.default_factory for f in dataclasses.fields(cls) if isinstance(f.default_factory, type)}
        built = {}
        for key, value in values.items():
            section, items = sections.get(key), _section_in(_type_hints(cls)[key])
            if items is not None and isinstance(value, (list, tuple)):
                built[key] = tuple(one if isinstance(one, items) else items.from_dict(one) for one in value)
            elif isinstance(section, type) and issubclass(section, _Section):
                built[key] = value if isinstance(value, section) else section.from_dict(value)
            else:
                built[key] = _tuples(value)
        return cls(**built)


def differences(config: _Section, other: _Section | None) -> dict[str, Any]:
    """Returns the fields of a config whose values another one (None: the defaults) does not have."""
    differing = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if value != (default if other is None else getattr(other, field.name)):
            differing[field.name] = value
    return differing


def _as_html(value: Any) -> str:
    return value._repr_html_() if isinstance(value, _Section) else f"<code>{html.escape(repr(value))}</code>"


def _arguments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def check_value(called: str, value: Any, hint: Any) -> None:
    """Raises `ConfigError` unless a value has the annotated type, and every number in it lies in its range."""
    if not _fits(value, hint):
        raise ConfigError(f"{called} must be {_describe(hint)}; it is {shown(value)} ({type(value).__name__}).")
    for number, allowed in _numbers(value, hint):
        problem = refusal(called, number, allowed)
        check(not problem, problem)


@functools.cache
def _type_hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _section_in(hint: Any) -> type[_Section] | None:
    """Returns the section that a field has any number of, as `tuple[Section, ...]` says."""
    item = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None
    return item if isinstance(item, type) and issubclass(item, _Section) else None


def _options(hint: Any) -> tuple[Any, ...]:
    """Returns the types of a union, or the one type."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Returns whether a value has the annotated type; an int is accepted as a float, and a bool is not a number."""
    if len(_options(hint)) > 1:
        return any(_fits(value, option) for option in _options(hint))
    if typing.get_origin(hint) is Annotated:
        return _fits(value, typing.get_args(hint)[0])
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(_fits(v, item) for v in value)
    if hint in (int, float):
        return isinstance(value, numbers.Integral if hint is int else numbers.Real) and not isinstance(value, bool)
    return value is None if hint is type(None) else isinstance(value, hint)


def _numbers(value: Any, hint: Any) -> Iterator[tuple[Any, Range]]:
    """Returns the numbers in a value that fits the annotation, each with its range."""
    hint = next(option for option in _options(hint) if _fits(value, option))
    if typing.get_origin(hint) is Annotated:
        yield value, typing.get_args(hint)[1]
    elif typing.get_origin(hint) is tuple:
        for item in value:
            yield from _numbers(item, typing.get_args(hint)[0])


def _describe(hint: Any) -> str:
    if len(_options(hint)) > 1:
        return " or ".join(map(_describe, _options(hint)))
    if typing.get_origin(hint) in (Annotated, tuple):
        inner = _describe(typing.get_args(hint)[0])
        return inner if typing.get_origin(hint) is Annotated else f"a list of {inner}"
    return "None" if hint is type(None) else hint.__name__


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def reject_unknown_keys(cls: type, keys: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for the first key that is no field of `cls`, naming the nearest one."""
    names = [f.name for f in dataclasses.fields(cls)]
    for key in keys:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Its fields are: {', '.join(names)}."
            raise ConfigError(f"{cls.__name__} has no field {key!r}.{hint}")
