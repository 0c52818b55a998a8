"""What a server counts, in Prometheus's text format."""

from __future__ import annotations

import collections
from collections.abc import Iterator

import jax.monitoring

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds
_COMPILED = "/jax/core/compile/backend_compile_duration"
compiled = collections.Counter[str]()


def _count(event: str, duration_secs: float, **_: object) -> None:
    if event == _COMPILED:
        compiled["programs"] += 1


jax.monitoring.register_event_duration_secs_listener(_count)


class Metrics:
    """Counters of requests and tokens, and a histogram of how long requests took."""

    def __init__(self) -> None:
        """Begins at zero."""
        self.requests: collections.Counter[tuple[str, int]] = collections.Counter()  # (path, status)
        self.tokens: collections.Counter[tuple[str, str]] = collections.Counter()  # (model, "prompt" or "completion")
        self._below: dict[str, collections.Counter[float]] = collections.defaultdict(collections.Counter)
        self._sum: collections.Counter[str] = collections.Counter()

    def request(self, path: str, status: int, seconds: float) -> None:
        """Counts a request that has ended."""
        self.requests[path, status] += 1
        self._sum[path] += seconds  # pyright: ignore[reportArgumentType] - a counter of floats
        self._below[path][next((bound for bound in BOUNDS if seconds <= bound), float("inf"))] += 1

    def text(self, gauges: dict[str, float]) -> str:
        """Returns everything, with what stands at the moment, by name."""
        return "".join(f"{line}\n" for line in self._lines(gauges))

    def _lines(self, gauges: dict[str, float]) -> Iterator[str]:
        yield "# TYPE flax_switch_requests_total counter"
        for (path, status), count in sorted(self.requests.items()):
            yield f'flax_switch_requests_total{{path="{path}",status="{status}"}} {count}'
        yield "# TYPE flax_switch_tokens_total counter"
        for (model, kind), count in sorted(self.tokens.items()):
            yield f'flax_switch_tokens_total{{model="{model}",kind="{kind}"}} {count}'
        yield "# TYPE flax_switch_request_seconds histogram"
        for path, below in sorted(self._below.items()):
            total = 0
            for bound in (*BOUNDS, float("inf")):
                total += below[bound]
                name = "+Inf" if bound == float("inf") else bound
                yield f'flax_switch_request_seconds_bucket{{path="{path}",le="{name}"}} {total}'
            yield f'flax_switch_request_seconds_sum{{path="{path}"}} {self._sum[path]:.6f}'
            yield f'flax_switch_request_seconds_count{{path="{path}"}} {total}'
        yield "# TYPE flax_switch_programs_compiled_total counter"
        yield f"flax_switch_programs_compiled_total {compiled['programs']}"
        for name, value in gauges.items():
            yield f"# TYPE flax_switch_{name} gauge"
            yield f"flax_switch_{name} {value:g}"
