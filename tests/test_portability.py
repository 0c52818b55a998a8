"""Import, generation and conversion without anything that only Unix has, in a process whose other packages are loaded already."""

import subprocess
import sys

import pytest

PROGRAM = r"""
import builtins, concurrent.futures.process, ctypes, ctypes.util, importlib, multiprocessing.connection, multiprocessing.context
import multiprocessing.popen_spawn_posix, os, pkgutil, platform, shutil, signal, subprocess, sys, tempfile, uuid
from pathlib import Path

import absl.logging, flax.linen, grain, jax, jaxtyping, ml_collections, numpy, optax, orbax.checkpoint, rich.progress
import sentencepiece, tensorstore, uvicorn
import jax.experimental.multihost_utils, jax.experimental.pallas.triton
from etils import epath

jax.numpy.ones(2).block_until_ready()
PLATFORM = sys.argv[1]
unix = ["fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog", "readline", "crypt", "posix", "spwd"]
for name in unix:
    sys.modules[name] = None
gone = "sysconf sched_getaffinity fork forkpty killpg getloadavg uname getpgid setsid mkfifo posix_fadvise".split()
for name in gone:
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "alarm", "setitimer", "SIGCHLD", "pause"):
    if hasattr(signal, name):
        delattr(signal, name)
sys.platform = PLATFORM
system = {"win32": "Windows", "darwin": "Darwin"}[PLATFORM]
platform.system = lambda: system
platform.libc_ver = lambda *args, **kwargs: ("", "")
real = ctypes.CDLL


def library(name, *args, **kwargs):
    if name is None and PLATFORM == "win32":
        raise TypeError("a library of Windows has a name")
    found = real(name, *args, **kwargs)
    if name is None:
        class WithoutMallopt:
            def __getattr__(self, attribute):
                if attribute.startswith("mall"):
                    raise AttributeError(attribute)
                return getattr(found, attribute)

        return WithoutMallopt()
    return found


ctypes.CDLL = library

import flax_switch as fs

for module in pkgutil.walk_packages(fs.__path__, "flax_switch."):
    if module.name != "flax_switch.__main__":
        importlib.import_module(module.name)
from flax_switch.cli import main
from flax_switch.host.memory import keep_freed_memory
from flax_switch.nn.init import init_params

assert keep_freed_memory() is False
config = fs.SwitchConfig(
    vocab_size=32, d_model=8, num_heads=2, d_kv=4, d_ff=16, num_encoder_layers=2, num_decoder_layers=2, num_experts=2,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
)
model = fs.SwitchTransformer(config)
params = init_params(model, jax.random.key(0))
ids = jax.numpy.array([[5, 6, 7, 1]])
before = fs.generate(model, params, ids, max_new_tokens=3).sequences
with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    fs.save_pretrained(folder / "native", config, params, format="flax_switch")
    assert main(["convert", str(folder / "native"), str(folder / "hf"), "--to", "huggingface"]) == 0
    again = fs.load_pretrained(folder / "hf")
    after = fs.generate(again.model, again.params, ids, max_new_tokens=3).sequences
assert (before == after).all()
print("generated", after.tolist())
"""


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_import_generation_and_conversion_need_nothing_that_only_unix_has(platform):
    ran = subprocess.run([sys.executable, "-c", PROGRAM, platform], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "generated" in ran.stdout
