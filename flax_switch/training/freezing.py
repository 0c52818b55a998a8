"""Which parameters are trained: a tree is cut down to them before gradients, updates and the optimiser's state are made.

Frozen parameters have no gradient, no statistics and no update; the train step hands them on as they are.
"""

import re
from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from flax_switch.config import ConfigError

# Names for `optimizer.trainable`, beside regular expressions; the parts that ST-MoE (2202.08906, section 5) trains alone.
PRESETS = {
    "all": ".*",
    "router": r"/router/",
    "experts": r"/expert/",
    "all_but_experts": r"^(?!.*/expert/)",
    "moe": r"/(router|expert)/",
    "attention": r"attention/",
}


def trainable_part(tree: Mapping[str, Any], pattern: str) -> dict[str, Any]:
    """Returns the leaves of a tree of parameters (or of anything in their place) whose path matches, still nested.

    Raises `ConfigError` for a pattern that is no regular expression or matches nothing.
    """
    pattern = PRESETS.get(pattern, pattern)
    if pattern == ".*":
        return dict(tree)
    try:
        matches = re.compile(pattern).search
    except re.error as error:
        raise ConfigError(f"optimizer.trainable={pattern!r} is no regular expression ({error}).") from error
    flat = flatten_dict(dict(tree), sep="/")
    kept = {path: leaf for path, leaf in flat.items() if matches(path)}
    if not kept:
        raise ConfigError(
            f"optimizer.trainable={pattern!r} matches no parameter; a path looks like {next(iter(flat))}, and there are names for "
            f"common parts: {', '.join(PRESETS)}."
        )
    return unflatten_dict(kept, sep="/")


def merged(whole: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `whole` with the leaves of `part` in place of its own."""
    return {
        key: merged(value, part[key]) if key in part and isinstance(value, Mapping) else part.get(key, value)
        for key, value in whole.items()
    }
