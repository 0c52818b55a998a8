"""The rule engine: a table of names and invertible transforms, read in both directions.

A foreign format is a list of `Rule`s. Each says which tensors of that format a tensor of the canonical tree (T5X's names) becomes.
Names hold placeholders: `{stack}` is encoder or decoder, `{i}` a layer, `{w}` one of wi, wi_0, wi_1 and wo, `{path}`
anything, and `{e}`, on the foreign side only, an expert: the canonical tensor is the stack of all of them.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from flax_switch.convert.tensors import CheckpointError, LazyTensor, abstract, stack, take, transpose

PLACEHOLDERS = {"stack": "encoder|decoder", "i": r"\d+", "w": "wi|wi_0|wi_1|wo", "path": ".+"}
NAMES_SHOWN = 12
_ENOUGH = 10_000  # missing tensors after which no more are looked for


@dataclasses.dataclass(frozen=True)
class Transform:
    """A map of one tensor and its inverse."""

    to_foreign: Callable[[LazyTensor], LazyTensor]
    to_canonical: Callable[[LazyTensor], LazyTensor]


SAME = Transform(lambda t: t, lambda t: t)
TRANSPOSE = Transform(transpose, transpose)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A canonical path, the foreign name or names it becomes, and how each tensor changes on the way."""

    canonical: str
    foreign: str
    transform: Transform = SAME

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """The regular expression of the canonical paths this rule speaks of."""
        parts = re.split(r"\{(\w+)\}", self.canonical)
        literal = [re.escape(part) for part in parts[::2]]
        groups = [f"(?P<{name}>{PLACEHOLDERS[name]})" for name in parts[1::2]]
        return re.compile("".join(a + b for a, b in zip(literal, [*groups, ""], strict=True)))

    def to_foreign(self, path: str, tensor: LazyTensor) -> dict[str, LazyTensor]:
        """Returns the foreign tensors of a canonical one."""
        found = self.pattern.fullmatch(path)
        assert found is not None  # the caller picked the row that matches
        fields = found.groupdict()
        if "{e}" not in self.foreign:
            return {self.foreign.format(**fields): self.transform.to_foreign(tensor)}
        return {self.foreign.format(e=e, **fields): self.transform.to_foreign(take(tensor, e)) for e in range(tensor.shape[0])}

    def to_canonical(self, tensors: Sequence[LazyTensor]) -> LazyTensor:
        """Returns the canonical tensor of the foreign ones, given in `to_foreign`'s order."""
        members = [self.transform.to_canonical(t) for t in tensors]
        return stack(members) if "{e}" in self.foreign else members[0]


SAME_NAMES = (Rule("{path}", "{path}"),)  # the table of a format that has the canonical names


def rule_of(path: str, rules: Iterable[Rule]) -> Rule:
    """Returns the one rule that speaks of a canonical path."""
    matching = [rule for rule in rules if rule.pattern.fullmatch(path)]
    if len(matching) != 1:
        found = "no rule" if not matching else "several rules (" + ", ".join(rule.foreign for rule in matching) + ")"
        raise CheckpointError(f"the other format has {found} for the tensor {path!r}")
    return matching[0]


def to_foreign(canonical: Mapping[str, LazyTensor], rules: Sequence[Rule]) -> dict[str, LazyTensor]:
    """Gives every tensor of a canonical tree its foreign name. Raises where a rule is missing or two tensors share a name."""
    foreign: dict[str, LazyTensor] = {}
    for path, tensor in canonical.items():
        for name, piece in rule_of(path, rules).to_foreign(path, tensor).items():
            if name in foreign:
                raise CheckpointError(f"two tensors would be written under the name {name!r}; one of them is {path!r}")
            foreign[name] = piece
    return foreign


def to_canonical(
    foreign: Mapping[str, LazyTensor],
    rules: Sequence[Rule],
    expected: Mapping[str, tuple[int, ...]],
    *,
    allow_missing: Sequence[str] = (),
) -> dict[str, LazyTensor]:
    """Returns the canonical tree of a foreign checkpoint.

    Args:
      foreign: all its tensors.
      rules: its table.
      expected: the canonical paths the model has, with their shapes.
      allow_missing: patterns (fnmatch) of foreign names or canonical paths that may be missing, or be left over. A canonical
        tensor of which a part is missing and forgiven is absent from the result.

    Raises:
      CheckpointError: naming all tensors that are missing, left over or of the wrong shape.
    """
    missing, wrong, used = [], [], set()
    canonical: dict[str, LazyTensor] = {}
    for path, shape in expected.items():
        if len(missing) > _ENOUGH:  # a config far from these tensors: nobody reads more
            break
        rule = rule_of(path, rules)
        pieces = rule.to_foreign(path, abstract(shape))
        absent = [name for name in pieces if name not in foreign]
        used |= pieces.keys()
        if absent:
            forgiven = all(is_forgiven(name, allow_missing) or is_forgiven(path, allow_missing) for name in absent)
            missing += [] if forgiven else absent
            continue
        bad = [name for name, piece in pieces.items() if foreign[name].shape != piece.shape]
        wrong += [f"{name} is {list(foreign[name].shape)} where {list(pieces[name].shape)} was expected" for name in bad]
        if not bad:
            canonical[path] = rule.to_canonical([foreign[name] for name in pieces])
    left_over = [name for name in foreign if name not in used and not is_forgiven(name, allow_missing)]
    report_problems(missing, left_over, wrong)
    return canonical


def is_forgiven(name: str, patterns: Sequence[str]) -> bool:
    """Returns whether one of the patterns names this tensor."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def report_problems(missing: Sequence[str], left_over: Sequence[str], wrong: Sequence[str]) -> None:
    """Raises one error that names every problem, and says what forgives it; does nothing without problems."""
    problems = []
    for what, names in (("missing", missing), ("left over", left_over), ("of the wrong shape", wrong)):
        if names:
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            problems.append(f"{len(names)} {what}: " + ", ".join(names[:NAMES_SHOWN]) + more)
    if problems:
        hint = " Missing and left-over tensors can be forgiven by name (--allow-missing NAME)." if missing or left_over else ""
        raise CheckpointError("the tensors do not fit the config. " + "; ".join(problems) + "." + hint)
