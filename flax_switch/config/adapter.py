"""Settings of an adapter: low-rank additions to a model's kernels, which are trained in their place (LoRA, 2106.09685).

A kernel W [D, F] with an adapter of rank r is W + scale * a b, with a [D, r] and b [r, F]; a stack of E experts has one of each for
every expert. With magnitudes m [F] (DoRA, 2402.09353) each column of that sum gets the norm m.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from flax_switch.config.base import _Section, check
from flax_switch.config.ranges import Natural, Positive, Rate

# Names for `adapter.targets`, beside regular expressions.
TARGETS = {
    "all": r"^(?!decoder/logits_dense/)",
    "attention": r"attention/",
    "mlp": r"mlp/(?!expert/)",
    "experts": r"/expert/",
}
ADAPTER = "adapter"  # where an adapter lies among the parameters of a run
PARTS = ("a", "b", "magnitude")


@dataclasses.dataclass(frozen=True)
class AdapterConfig(_Section):
    """An adapter to train while the model stays as it is."""

    section: ClassVar[str] = "adapter"

    rank: Natural = 0  # r; 0: no adapter, the model itself is trained
    alpha: Positive = 16.0  # what is added is scaled by alpha / rank
    # names (all, attention, mlp, experts) or regular expressions over paths of kernels, such as "attention/(query|value)"
    targets: str | tuple[str, ...] = "all"
    dropout: Rate = 0.0  # of the inputs that a reads, in each step the same for all tokens (2404.09610)
    use_rslora: bool = False  # scaled by alpha / sqrt(rank) instead (2312.03732)
    use_dora: bool = False  # magnitudes are learnt apart from directions
    router: bool = False  # routers have an adapter, too

    def __post_init__(self) -> None:
        super().__post_init__()
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                check(False, f"adapter.targets: {pattern!r} is no regular expression ({error}).")

    @property
    def patterns(self) -> tuple[str, ...]:
        """The regular expressions that `targets` stand for."""
        named = (self.targets,) if isinstance(self.targets, str) else self.targets
        return tuple(TARGETS.get(name, name) for name in named)

    def scale(self, rank: int | None = None, alpha: float | None = None) -> float:
        """Returns what a b is multiplied by; for a kernel with a rank or alpha other than these."""
        rank, alpha = rank or self.rank, self.alpha if alpha is None else alpha
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def kernels(self, shapes: Mapping[str, Any]) -> list[str]:
        """Returns the paths of the kernels that the adapter is for. Raises `ConfigError` where there are none."""
        kernels = [path for path in shapes if path.endswith("/kernel")]
        found = [path for path in kernels if self._takes(path)]
        check(
            bool(found),
            f"adapter.targets={self.targets!r} matches no kernel; a path looks like {next(iter(kernels), 'layer/kernel')}, and "
            f"there are names for common parts: {', '.join(TARGETS)}.",
        )
        return found

    def _takes(self, path: str) -> bool:
        if "/router/" in path:
            return self.router
        return any(re.search(pattern, path) for pattern in self.patterns)


def matrix(path: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape [(E,) D, F] of the matrices that a kernel is, which may have several axes of inputs or outputs."""
    lead = int("/expert/" in path)
    rest = shape[lead:]
    inputs = len(rest) - 1 if "/router/" in path else 2 if "o_wo_fused" in path else 1
    return (*shape[:lead], math.prod(rest[:inputs]), math.prod(rest[inputs:]))


def part_shapes(path: str, shape: Sequence[int], rank: int, *, dora: bool) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of an adapter's parts for a kernel."""
    *lead, D, F = matrix(path, shape)
    shapes = {"a": (*lead, D, rank), "b": (*lead, rank, F)}
    return {**shapes, "magnitude": (*lead, F)} if dora else shapes


def column_norms(kernel: Any) -> Any:
    """Returns the norms [..., F] of a matrix's columns, or of each of a stack; arrays may be numpy's or JAX's."""
    return (kernel * kernel).sum(-2) ** 0.5


def combined(kernel: Any, a: Any, b: Any, magnitude: Any = None) -> Any:
    """Returns the matrices [(E,) D, F] that a kernel and its adapter are; b is scaled already."""
    total = kernel + a @ b
    return total if magnitude is None else total * (magnitude / column_norms(total))[..., None, :]
