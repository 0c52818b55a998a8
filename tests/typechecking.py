"""Checks of types at run time, for every test: shapes, dtypes and classes as annotated, and no implicit broadcasting of ranks.

`conftest` imports this module before the package, so that the package's functions are decorated when they are first imported.
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any, Self

# Programs that tests start inherit it.
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")

from beartype import BeartypeConf, beartype  # noqa: E402 - after the environment
from jaxtyping import install_import_hook  # noqa: E402

CHECKED = ("flax_switch.ops", "flax_switch.nn", "flax_switch.generation", "flax_switch.training", "flax_switch.workflows")
# Its constructor checks what people ask for, and says it in words of its own.
UNCHECKED = ("GenerationConfig.__init__",)
install_import_hook(CHECKED, "typechecking.checked")


def checked(function: Callable) -> Callable:
    """Has beartype check a function's annotations; a dataclass's fields only where this project builds it.

    JAX and Flax rebuild dataclasses with whatever a tree's leaves become on its way (axis names, shardings, stacked arrays).
    """
    if function.__qualname__ in UNCHECKED:
        return function
    # beartype knows what Self is only where it decorates the whole class.
    function.__annotations__ = {n: Any if hint is Self else hint for n, hint in function.__annotations__.items()}
    check = beartype(conf=BeartypeConf(is_pep484_tower=True))(function)  # an int is a fine float
    if function.__name__ != "__init__":
        return check

    @functools.wraps(function)
    def check_own(*args: Any, **kwargs: Any) -> None:
        frame = sys._getframe(1)
        while frame.f_globals.get("__name__", "") in (__name__, "jaxtyping._decorator"):
            frame = frame.f_back
        if frame.f_globals.get("__name__", "").startswith(("flax_switch", "test_")):
            check(*args, **kwargs)

    return check_own
