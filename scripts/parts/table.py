"""What the parts of a test run cost, and what came of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Part:
    """One part of a run."""

    name: str
    minutes: float = 0.0
    ok: bool = True
    outcomes: Counter = field(default_factory=Counter)  # passed, failed, skipped, xfailed
    reasons: Counter = field(default_factory=Counter)  # of tests that were skipped
    failed: list[str] = field(default_factory=list)
    flaky: list[str] = field(default_factory=list)  # failed, and passed when run once more alone
    seconds: dict[str, float] = field(default_factory=dict)  # that every test took
    note: str = ""

    def row(self) -> str:
        """The part's row of the table."""
        count = self.outcomes
        cells = [f"{self.minutes:7.1f}", f"{count['passed']:6}", f"{count['failed']:6}", f"{len(self.flaky):5}"]
        return f"| {self.name:<28} | {' | '.join(cells)} | {count['skipped']:7} | {'yes' if self.ok else 'NO':<3} |"


def render(parts: list[Part]) -> str:
    """The table, what was skipped and why, what failed, and last a line like pytest's."""
    lines = [
        "| part                         | minutes | passed | failed | flaky | skipped | ok  |",
        "|------------------------------|--------:|-------:|-------:|------:|--------:|-----|",
        *(part.row() for part in parts),
    ]
    for part in parts:
        lines += [f"{part.name}: {part.note}"] if part.note else []
        lines += [f"{part.name}: {count} skipped: {reason}" for reason, count in part.reasons.most_common()]
        lines += [f"{part.name}: FLAKY (failed, then passed alone): {test}" for test in part.flaky]
        lines += [f"{part.name}: FAILED {test}" for test in part.failed]
        lines += [] if part.ok or part.failed else [f"{part.name}: FAILED"]
    return "\n".join([*lines, summary(parts)])


def summary(parts: list[Part]) -> str:
    """The last line, which is like pytest's own: "=== 12 passed, 1 failed in 3.0 min ===". A part without tests counts as one."""
    total: Counter = Counter()
    for part in parts:
        total += part.outcomes
        total["flaky"] += len(part.flaky)
        total["failed"] += not part.ok and not part.outcomes["failed"]
    names = ("passed", "failed", "flaky", "skipped", "xfailed")
    shown = {name: total[name] for name in names if total[name] or name in ("passed", "failed")}
    minutes = sum(part.minutes for part in parts)
    return f"==== {', '.join(f'{n} {name}' for name, n in shown.items())} in {minutes:.1f} min ===="
