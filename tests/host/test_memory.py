"""Kept memory: a process that asks for it gets no fresh pages for what it allocates again, and others are left alone."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from flax_switch.host.memory import keep_freed_memory
print(keep_freed_memory())
work = lambda: len(b"x" * 200_000_000)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is set only in the GNU C library")


def run(**environment) -> tuple[str, int]:
    env = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "JAX_PLATFORMS")} | environment
    done, faults = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True
    ).stdout.split()
    return done, int(faults)


@glibc
def test_what_is_allocated_again_needs_no_fresh_pages():
    kept, faults = run(JAX_PLATFORMS="cpu")
    assert kept == "True"
    assert faults < 1000  # 200 MB are 49,000 pages of 4 KiB, and more than malloc leaves itself when it gives memory back


@glibc
def test_without_it_every_allocation_does():
    left_alone, faults = run(JAX_PLATFORMS="cuda,cpu", GLIBC_TUNABLES="glibc.malloc.mmap_threshold=1048576")
    assert left_alone == "False"
    assert faults > 100_000


@glibc
def test_neither_an_accelerator_nor_settings_of_ones_own_are_interfered_with():
    assert run(JAX_PLATFORMS="tpu")[0] == "False"
    assert run(JAX_PLATFORMS="cpu", GLIBC_TUNABLES="glibc.malloc.arena_max=2")[0] == "False"
