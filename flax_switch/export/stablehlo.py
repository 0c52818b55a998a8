"""Programs as StableHLO, by `jax.export`: one file for any batch and length, and for every platform that it was lowered for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax import export

from flax_switch.config import SwitchConfig, one_of
from flax_switch.export.programs import Program, programs

PLATFORMS = ("cpu", "cuda", "tpu")
LOADER = "load.py"


def stablehlo_files(
    config: SwitchConfig,
    params: Mapping[str, jax.ShapeDtypeStruct],
    *,
    architecture: str = "full",
    platforms: Sequence[str] = PLATFORMS,
    **controls: Any,
) -> dict[str, bytes]:
    """Returns the files of a model's programs, by their names, and the module that loads them.

    Raises:
      ConfigError: naming what of the config or of the controls cannot be exported.
      ImportError: without flatbuffers (extra `export`), which `jax.export` writes with.
    """
    for platform in platforms:
        one_of("platform", platform, PLATFORMS)
    found = programs(config, params, architecture=architecture, **controls)
    files = {f"{name}.stablehlo": _lowered(program, params, platforms) for name, program in found.items()}
    return files | ({LOADER: Path(__file__).with_name(LOADER).read_bytes()})


def _lowered(program: Program, params: Mapping[str, jax.ShapeDtypeStruct], platforms: Sequence[str]) -> bytes:
    lowered = export.export(jax.jit(program.function), platforms=tuple(platforms))(dict(params), *program.arguments)
    try:
        return bytes(lowered.serialize())
    except ImportError as error:
        raise ImportError("Writing StableHLO needs pip install 'flax_switch[export]'.") from error
