"""Ways to damage a file: its bytes, the JSON in it, or what lies at its path."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

NUMBERS = (0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), 3.0)
VALUES = (
    None, True, False, "", "x", "<extra_id_0>", "\ud800", "\x00", "ä" * 300, "../../../etc/passwd", "-1", "nan", [], {}, [[]],
    [None], ["a", 1], {"a": 1}, {"": None}, [1, 2, 3], [0.5, "x"], ["x"] * 1000, {"content": 3}, [{}],
)  # fmt: skip
_INSERTS = (
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\r",
    b'"',
    b"{",
    b"[",
    b"\xed\xa0\x80",
    b"\\ud800",
    b"1" * 5000,
    b"\xe2\x80\xa8",
)
_FULL = 1 << 26  # a length field may ask for more than there is, a file need not have more than this


def damage(path: Path, rng: random.Random) -> None:
    """Damages a file in a way that the generator draws."""
    ways = [_path] if rng.random() < 0.15 else [_bytes]
    if ways == [_bytes] and path.suffix in (".json", ".jsonl") and rng.random() < 0.75:
        ways = [_json]
    ways[0](path, rng)


# --- the bytes
def _bytes(path: Path, rng: random.Random) -> None:
    path.write_bytes(damaged_bytes(path.read_bytes(), rng))


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """Returns the bytes flipped, cut, zeroed, doubled, in another encoding, or with others among them."""
    size = len(content)
    at, end = sorted(rng.randrange(size + 1) for _ in range(2))
    if rng.random() < 0.5:  # heads of files say what follows
        at, end = sorted(rng.randrange(min(size, 64) + 1) for _ in range(2))
    kind = rng.randrange(12)
    if kind < 3 and size:
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 1, 8, 64))):
            changed[rng.randrange(at, max(end, at + 1)) % size] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 3:
        return content[:end]
    if kind == 4:
        return content[:at] + bytes(end - at) + content[end:]
    if kind == 5:
        return content[:at] + content[end:]
    if kind == 6:
        return content[:end] + content[at:end] * rng.choice((1, 3, 50)) + content[end:]
    if kind == 7:
        return content[:at] + rng.choice(_INSERTS) + content[at:]
    if kind == 8:
        return content[:at] + rng.randbytes(rng.choice((1, 4, 8, 100))) + content[end:]
    if kind == 9:
        return content[:at] + b"\xff" * rng.choice((1, 4, 8)) + content[at + rng.choice((1, 4, 8)) :]
    if kind == 10:
        text = content.decode("utf-8", "replace")
        return rng.choice(
            (text.encode("utf-16"), text.encode("utf-8-sig"), text.encode("latin-1", "replace"), text.encode("utf-32"))
        )
    return rng.choice(
        (b"", b"\x00" * 100, content.replace(b"\n", b"\r\n"), content + rng.randbytes(50), b"null", b"<html>404</html>")
    )


# --- the JSON
def _json(path: Path, rng: random.Random) -> None:
    try:
        text = path.read_text()
        lines = text.splitlines() if path.suffix == ".jsonl" else [text]
        row = rng.randrange(len(lines))
        lines[row] = damaged_json(json.loads(lines[row]), rng)
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    except (ValueError, IndexError):  # it is damaged already
        _bytes(path, rng)


def damaged_json(value: Any, rng: random.Random) -> str:
    """Returns the text of a JSON value with a part replaced, removed, there twice, or nested without end."""
    holders = _holders(value)
    mark, put = "@@@", rng.choice(("value", "number", "number", "remove", "twice", "deep", "long", "rename"))
    if not holders:
        return json.dumps(rng.choice(VALUES))
    holder, key = rng.choice(holders)
    new: Any = None
    if put == "remove":
        del holder[key]
    elif put == "rename" and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif put in ("value", "number"):
        new = rng.choice(VALUES if put == "value" else NUMBERS)
        holder[key] = new
    else:
        holder[key] = mark
    text = json.dumps(value)
    depth = rng.choice((50, 2000, 200_000))
    if put == "deep":
        return text.replace(f'"{mark}"', rng.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "[" * depth)))
    if put == "long":
        return text.replace(f'"{mark}"', rng.choice(("9" * 5000, "1e999", "-1e999", '"' + "x" * 1_000_000 + '"', "0x10", "1_000")))
    if put == "twice" and isinstance(holder, dict):
        return text.replace(f'"{mark}"', f"1, {json.dumps(str(key))}: 2")
    return text.replace(f'"{mark}"', "1")


def _holders(value: Any) -> list[tuple[Any, Any]]:
    """Returns every (object or list, key) in a value, its outermost first and not more than there is use for."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting and len(found) < 5000:
        one = waiting.pop(0)
        keys = list(one) if isinstance(one, dict) else list(range(len(one))) if isinstance(one, list) else []
        found += [(one, key) for key in keys]
        waiting += [one[key] for key in keys]
    return found


# --- the path
def _path(path: Path, rng: random.Random) -> None:
    """Puts something else there: nothing, a folder, a pipe, a link to a device, to nowhere or to itself, a file without rights."""
    kind = rng.randrange(8)
    mode = path.stat().st_mode
    path.unlink()
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.symlink_to(rng.choice(("/dev/zero", "/dev/null", "/dev/random", "/dev/tty")))
    elif kind == 4:
        path.symlink_to("nowhere")
    elif kind == 5:
        path.symlink_to(path.name)
    elif kind == 6:
        path.symlink_to("/etc/hostname")
    elif kind == 7:
        path.write_bytes(b"")
        with open(path, "r+b") as file:
            file.truncate(_FULL)  # zeros, of which the disk holds none
        path.chmod(mode)


def damage_folder(folder: Path, patterns: tuple[str, ...], rng: random.Random) -> None:
    """Damages one or two of a folder's files that the patterns name, or at times removes a folder in it."""
    files = sorted({path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()})
    for path in rng.sample(files, min(len(files), rng.choice((1, 1, 1, 2)))):
        damage(path, rng)
    folders = sorted(path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())
    if folders and rng.random() < 0.03:
        shutil.rmtree(rng.choice(folders))
