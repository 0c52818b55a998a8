"""The wheel by itself: builds sdist and wheel, looks into them, installs the wheel and uses it in an empty folder, offline.

    python scripts/wheel_test.py                # a minute: the wheel alone is installed, beside this environment's packages
    python scripts/wheel_test.py --full         # everything is downloaded and installed afresh, as a newcomer's pip would
    python scripts/wheel_test.py --dist DIR     # tests the sdist and wheel in DIR, instead of building them (a release does)

"Offline" means: proxies that lead nowhere, Hugging Face's library told to be offline, and every connection of a Python
socket but those to this machine refused. Sockets that C++ code opens without a proxy are not stopped.
"""

from __future__ import annotations

import argparse
import email
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "model.d_model=32", "model.d_ff=64", "model.num_heads=2", "model.d_kv=16", "data.batch_size=8", "train.log_every=2",
    "train.eval_batches=1", "train.checkpoint_every=2", "train.sample_spans=1",
]  # fmt: skip
NO_NETWORK = """
import socket
connect = socket.socket.connect
def refuse(self, address):
    if self.family != getattr(socket, "AF_UNIX", None) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise OSError(f"no network in this test: {address}")
    return connect(self, address)
socket.socket.connect = refuse
"""
NOWHERE = "http://127.0.0.1:9"
ALL_RECIPES = """
from pathlib import Path
import flax_switch, flax_switch.configs.tiny
from flax_switch.config import recipes, shipped
inside = Path(flax_switch.__file__).parent
assert shipped.folder() == inside / "configs", shipped.folder()
for name in shipped.names():
    assert recipes.load_gin([name]) == recipes.load_recipe(name), name
print(inside)
"""


# --- building
def copy_of_checkout(folder: Path) -> Path:
    """The files git knows or would add, so that nothing left over from an earlier build gets in."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def build(source: Path, dist: Path, isolated: bool) -> None:
    """Makes an sdist, and of it the wheel."""
    command = [sys.executable, "-m", "build", "--outdir", str(dist), str(source), *([] if isolated else ["--no-isolation"])]
    run(command, cwd=source)


# --- looking into them
def check_wheel(wheel: Path) -> None:
    """Raises unless the wheel holds the package, its recipes and its licence, and nothing else."""
    package = (ROOT / "flax_switch").rglob("*.py")
    recipes = [p for pattern in ("*.py", "gin/*.gin") for p in (ROOT / "configs").glob(pattern)]
    expected = {p.relative_to(ROOT).as_posix() for p in package} | {
        f"flax_switch/{p.relative_to(ROOT).as_posix()}" for p in recipes
    }
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        info = {name.partition(".dist-info/")[2]: file.read(name) for name in file.namelist() if ".dist-info/" in name}
    others = {f"flax_switch/{name}" for name in ("py.typed", "pages/page.css", "pages/page.js", "serving/page.html")}
    expect(names == expected | others, f"files of the wheel: {sorted(names ^ expected)}")
    expect(info["licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes(), "LICENSE")
    expect(info["top_level.txt"].split() == [b"flax_switch"], f"top level: {info['top_level.txt']}")
    check_metadata(info["METADATA"].decode())


def check_metadata(text: str) -> None:
    """Raises unless the metadata say what setup.cfg means them to."""
    metadata = email.message_from_string(text)
    expect(metadata["Version"] == version(), f"version {metadata['Version']}")
    expect(metadata["License-Expression"] == "Apache-2.0", f"licence {metadata['License-Expression']}")
    expect(metadata["Description-Content-Type"] == "text/markdown" and metadata.get_payload().startswith("# flax_switch"), "readme")
    expect(metadata["Requires-Python"] == ">=3.11" and metadata["Keywords"], "Python versions or keywords")
    for python in ("3.11", "3.12", "3.13", "3.14"):
        expect(f"Programming Language :: Python :: {python}" in metadata.get_all("Classifier"), f"classifier of {python}")
    needed = {re.split(r"[^\w-]", line)[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    expect({"jax", "flax", "protobuf"} <= needed and not needed & {"torch", "safetensors", "tensorflow"}, f"needs {needed}")


def check_sdist(sdist: Path) -> None:
    """Raises unless the sdist holds what is needed to build, read and test."""
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    for name in ("LICENSE", "README.md", "setup.cfg", "configs/gin/tiny.gin", "tests/conftest.py", "docs/architecture.md"):
        expect(name in names, f"the sdist lacks {name}")
    expect(not any(name.startswith((".venv", "runs", "build/", "dist/")) for name in names), "left-overs in the sdist")


def version() -> str:
    """The one in the source."""
    return re.search(r'^__version__ = "(.+?)"', (ROOT / "flax_switch/__init__.py").read_text(), re.M).group(1)


# --- installing
def environment(folder: Path, package: str, full: bool, *options: str) -> Path:
    """A fresh virtual environment with the package; returns its folder of executables.

    Unless `full`, what the package needs comes from the environment this runs in: its folders are put on the path by a .pth file,
    whose own .pth files (of an editable install, say) are not read.
    """
    run([sys.executable, "-m", "venv", *([] if full else ["--without-pip"]), str(folder)])
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    site = Path(run([str(scripts / "python"), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    if full:
        pip, options = [str(scripts / "python"), "-m", "pip"], list(options)
    else:
        (site / "beside.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("site-packages")))
        pip = [sys.executable, "-m", "pip", "--python", str(scripts / "python")]
        options = ["--ignore-installed", "--no-deps", "--no-index", "--no-build-isolation", *options]
    run([*pip, "--disable-pip-version-check", "install", "--quiet", *options, package])
    (site / "no_network.py").write_text(NO_NETWORK)
    (site / "no_network.pth").write_text("import no_network\n")
    return scripts


def clean_environment(home: Path) -> dict[str, str]:
    """Variables of the shell without those that would lend the wheel a checkout, a cache, a device or a network."""
    dropped = ("PYTHON", "XLA_", "JAX_", "HF_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    proxies = {name: NOWHERE for scheme in ("http", "https", "all") for name in (f"{scheme}_proxy", f"{scheme}_proxy".upper())}
    here = {"HOME": str(home), "USERPROFILE": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    quick = {
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "JAX_COMPILATION_CACHE_DIR": str(home / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    return {**kept, **proxies, **here, **quick, "JAX_PLATFORMS": "cpu", "NPROC": "32", "HF_HUB_OFFLINE": "1"}


# --- using
def use_wheel(scripts: Path, empty: Path) -> None:
    """Pre-trains, resumes by gin, reports and generates, by names alone; raises where anything but the run is left behind."""
    home = empty.with_name("home")
    home.mkdir()
    empty.mkdir()
    env = clean_environment(home)
    python, command = str(scripts / "python"), str(scripts / "flax-switch")

    def flax_switch(*args: str, stdin: str | None = None) -> str:
        return run([command, *args], cwd=empty, env=env, stdin=stdin)

    expect("no network" in run([python, "-c", CONNECTS], cwd=empty, env=env), "a connection was not refused")
    expect(str(scripts.parent) in run([python, "-c", ALL_RECIPES], cwd=empty, env=env), "flax_switch is not the wheel's")
    expect(flax_switch("--version") == f"flax_switch {version()}\n", "--version")
    expect(run([python, "-m", "flax_switch", "--version"], cwd=empty, env=env).endswith(f"{version()}\n"), "python -m flax_switch")
    expect(len(json.loads(flax_switch("recipes", "--json"))) >= 17 and "switch-c-2048" in flax_switch("presets"), "listings")
    mistyped = subprocess.run([command, "pretrain", "--config", "tinny", "--workdir", "x"], cwd=empty, env=env, capture_output=True)
    expect(mistyped.returncode == 2 and b"Did you mean --config tiny?" in mistyped.stderr, mistyped.stderr.decode())
    recipe = ["pretrain", "--config", "tiny", "--workdir", "runs/tiny", *(f"--config.{setting}" for setting in SMALL)]
    flax_switch(*recipe, "--config.train.steps=4")
    gin = ["pretrain", "--gin-file", "tiny", "--workdir", "runs/tiny", *(f"--gin.{setting}" for setting in SMALL)]
    expect("from step 4" in flax_switch(*gin, "--gin.train.steps=6"), "the run did not resume")
    expect("report.html" in flax_switch("report", "runs/tiny"), "report")
    expect((empty / "runs/tiny/report.html").stat().st_size > 10_000, "the report is too small")
    lines = flax_switch("generate", "--checkpoint", "runs/tiny", "--max-new-tokens", "8", stdin="Return the <extra_id_0> list.\n")
    expect(len([json.loads(line) for line in lines.splitlines()]) == 1, f"generated {lines!r}")
    expect(os.listdir(empty) == ["runs"], f"left behind: {os.listdir(empty)}")


CONNECTS = """
import socket
try:
    socket.create_connection(("192.0.2.1", 80), timeout=1)
except OSError as error:
    print(error)
"""


def use_editable(scripts: Path, source: Path, empty: Path) -> None:
    """Names and paths of an editable install: names anywhere, paths from the checkout."""
    env, python = clean_environment(empty.with_name("home")), str(scripts / "python")
    for folder, recipe, gin in ((empty, "tiny", "tiny"), (source, "configs/tiny.py", "configs/gin/tiny.gin")):
        code = f"from flax_switch.config import recipes as r; print(r.load_recipe({recipe!r}) == r.load_gin([{gin!r}]), r.__file__)"
        expect(run([python, "-c", code], cwd=folder, env=env) == f"True {source / 'flax_switch/config/recipes.py'}\n", recipe)
    expect(run([str(scripts / "flax-switch"), "--version"], cwd=empty, env=env) == f"flax_switch {version()}\n", "--version")


# --- the rest
def run(command: list[str], *, cwd: Path | None = None, env: dict[str, str] | None = None, stdin: str | None = None) -> str:
    """What a command prints; a command that fails ends the test with all it said."""
    done = subprocess.run(command, cwd=cwd, env=env, input=stdin, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def expect(condition: bool, found: str) -> None:
    """Ends the test where a condition does not hold."""
    if not condition:
        sys.exit(f"The wheel is not whole: {found}")


def main() -> None:
    """Runs it all in a temporary folder, and says how long each part took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="install everything afresh, from the network")
    parser.add_argument("--dist", type=Path, metavar="DIR", help="holds one sdist and one wheel")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, start = Path(name), time.perf_counter()

        def say(what: str) -> None:
            print(f"{time.perf_counter() - start:6.1f} s  {what}", flush=True)

        source, dist = copy_of_checkout(folder / "source"), args.dist or folder / "dist"
        if args.dist is None:
            if importlib.util.find_spec("build") is None:
                sys.exit("Building needs the package build: pip install 'flax_switch[test]'.")
            build(source, dist, isolated=args.full)
        (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
        check_wheel(wheel)
        check_sdist(sdist)
        say(f"{wheel.name} ({wheel.stat().st_size / 1024:.0f} KiB) and {sdist.name} hold what they should")
        scripts = environment(folder / "wheel", f"{wheel}[gin,plots]" if args.full else str(wheel), args.full)
        say("installed the wheel")
        use_wheel(scripts, folder / "empty")
        say("used it in an empty folder: pretrain, resume, report, generate")
        if not args.full:
            use_editable(environment(folder / "editable", str(source), False, "--editable"), source, folder / "empty")
            say("used an editable install")


if __name__ == "__main__":
    main()
