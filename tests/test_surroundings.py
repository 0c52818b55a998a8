"""Commands in odd surroundings: closed and full standard streams, names that are not UTF-8, no home, no device, little memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flax_switch import cli
from flax_switch.config import ConfigError
from flax_switch.data import sources
from flax_switch.host import compile_cache
from flax_switch.host.files import absolute, cache_folder, expanded, write_text

ROOT = Path(__file__).parents[1]
unix = pytest.mark.skipif(sys.platform == "win32", reason="file descriptors and names are Unix's")


def shell(line, **environment):
    """Runs a line of the shell, in which $flax_switch is the command."""
    everything = {**os.environ, "PYTHONPATH": str(ROOT), "flax_switch": f"{sys.executable} -m flax_switch", **environment}
    return subprocess.run(["sh", "-c", line], cwd=ROOT, env=everything, capture_output=True, text=True, timeout=60, check=False)


@unix
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_standard_stream_is_an_empty_one(closed):
    ended = shell(f"$flax_switch presets {closed}")
    assert (ended.returncode, ended.stderr) == (0, "")
    ended = shell(f"$flax_switch inspect absent {closed}")
    assert ended.returncode == 2 and "Traceback" not in ended.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
@pytest.mark.parametrize("arguments", ["presets", "presets --json", "recipes tiny"])
def test_standard_output_on_a_full_disk_is_one_sentence(arguments):
    ended = shell(f"$flax_switch {arguments} > /dev/full")
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1 and "no space left" in ended.stderr


@unix
def test_a_name_that_is_not_utf_8_can_be_printed_and_read(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    Path(os.fsdecode(folder), "text.txt").write_text("one\ntwo\n")
    paths = sources.find_files(os.fsdecode(folder))
    assert list(sources.documents(paths)) == ["one", "two"]
    assert len(sources.fingerprint(paths, "text", "line")) == 20
    write_text(Path(os.fsdecode(folder), "page.html"), os.fsdecode(folder))
    ended = shell(f'$flax_switch inspect "$(printf "{tmp_path}/caf\\351")"')
    assert ended.returncode == 2 and "holds no checkpoint" in ended.stderr and "Traceback" not in ended.stderr


@unix
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_output_fits_whatever_the_terminal_can_show(encoding):
    code = "import flax_switch.cli as c, sys; c._open_streams(); print('caf\\xe9 \\u65e5 \\udce9')"
    ended = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True)
    assert ended.returncode == 0 and ended.stdout.startswith(b"caf")


def test_a_user_who_is_not_known_and_a_user_without_a_home(monkeypatch, tmp_path):
    assert expanded("~nobody-of-that-name/model") == Path("~nobody-of-that-name/model")
    assert absolute("~nobody-of-that-name/model").name == "model"
    assert cli.main(["inspect", "~nobody-of-that-name/model"]) == 2
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where neither HOME nor the system's list knows one
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if sys.platform not in ("win32",):
        with pytest.raises(ConfigError, match="no home folder.* data.cache_dir"):
            cache_folder(None)
    assert cache_folder(str(tmp_path)) == tmp_path


def test_without_a_home_programs_are_compiled_anew(monkeypatch, caplog):
    import jax

    def homeless(configured):
        raise ConfigError("no home")

    monkeypatch.delenv(compile_cache.ENVIRONMENT, raising=False)
    monkeypatch.setattr(compile_cache, "cache_folder", homeless)
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        with caplog.at_level("INFO"):
            assert compile_cache.use_compile_cache() is None
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
    assert "compiled anew in every run: no home" in caplog.text


def test_homes_are_looked_up_in_one_place():
    sources = {path: path.read_text() for path in (ROOT / "flax_switch").rglob("*.py")}
    asks = [path for path, text in sources.items() if ".expanduser()" in text or "Path.home" in text]
    assert asks == [], "pathlib raises RuntimeError for a user it does not know: host.files.expanded does not"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"),
            "a device's memory is not enough (RESOURCE_EXHAUSTED",
        ),
        (RuntimeError("Unable to initialize backend 'tpu': no device"), "Unable to initialize backend 'tpu': no device."),
        (ImportError("'a/b' is no folder: pip install 'flax_switch[hub]'."), "pip install 'flax_switch[hub]'"),
    ],
    ids=["memory", "device", "extra"],
)
def test_what_a_machine_lacks_is_one_message(monkeypatch, capsys, error, words):
    def run(args):
        raise error

    monkeypatch.setattr("flax_switch.commands.presets.run", run)
    assert cli.main(["presets"]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_a_mistake_of_ours_is_no_message(monkeypatch):
    for error in (RuntimeError("a bug"), ImportError("No module named 'flax_swich'")):
        monkeypatch.setattr("flax_switch.commands.presets.run", lambda args, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            cli.main(["presets"])
