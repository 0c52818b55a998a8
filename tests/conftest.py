"""Environment every test needs before jax is imported."""

import os
from importlib.metadata import version
from pathlib import Path

# Eight virtual CPU devices for the sharding tests; NPROC keeps their collectives from dead-locking on small machines.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile far longer than they run, so LLVM is told to hurry, one module a program. XLA's older writer of LLVM's code takes
# half of the newer one's time; JAX 0.12 has it no more.
HURRY = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if version("jaxlib").startswith("0.10."):
    HURRY.append("--xla_cpu_use_fusion_emitters=false")
for flag in HURRY:
    if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()

# Many tests compile the same program, in this process or in one that they start. Most are single operations outside jit, of which
# each costs 40 ms to compile and a quarter of that to read.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import pytest  # noqa: E402
import typechecking  # noqa: E402, F401 - after the environment, before the package
from costs import pytest_collection_modifyitems, pytest_configure  # noqa: E402, F401 - hooks
from hypothesis import settings  # noqa: E402
from missing_oracles import pytest_make_collect_report, pytest_runtest_makereport  # noqa: E402, F401 - hooks

# The same examples in every run: a check that fails must fail for whoever runs it next. A soak draws others in every round.
settings.register_profile("fixed", derandomize="SOAK_ROUND" not in os.environ, deadline=None)
settings.load_profile("fixed")


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_end_with_their_module():
    """Every compiled program holds hundreds of memory mappings, and Linux ends a process that asks for more than 65,530."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture(autouse=True)
def compiler_of_the_hardware(request):
    """A test marked `hardware` fails where there is no compiler for it: who asks for that part means to run it."""
    marker = request.node.get_closest_marker("hardware")
    if marker is not None:
        from flax_switch.host.compilers import can_compile_for

        if not can_compile_for(marker.args[0]):
            pytest.fail(f"no compiler for {marker.args[0]} is installed: pip install 'flax_switch[test-hardware]' (on Linux)")
