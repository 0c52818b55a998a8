"""A vocabulary called as tokenizers are: one text or many in, ids and attention masks out, padded and cut as asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from flax_switch.config import check, one_of

PADDING = ("longest", "max_length", "do_not_pad")


class Encoding(dict[str, Any]):
    """Ids and masks by name; each is an attribute, too. `model(**encoding)` takes them."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"this encoding has no {name}; it has {', '.join(self)}")


def encode_texts(
    encode: Callable[[str], list[int]],
    texts: str | Sequence[str],
    *,
    eos_id: int | None,
    pad_id: int,
    padding: bool | str = False,
    truncation: bool | str = False,
    max_length: int | None = None,
    pad_to_multiple_of: int | None = None,
) -> tuple[Any, Any]:
    """Returns (ids, masks) of one text, or of each of many, as lists; see `Vocabulary.__call__`, which says what each means.

    eos_id: what closes every text; None for nothing.
    """
    one = isinstance(texts, str)
    odd = (
        next((type(text).__name__ for text in texts if not isinstance(text, str)), None) if isinstance(texts, (list, tuple)) else ""
    )
    check(
        one or odd is None,
        f"A vocabulary takes a text or a list of texts; this is a {type(texts).__name__}{odd and f' with a {odd} in it'}.",
    )
    multiple = pad_to_multiple_of or 1
    check(multiple >= 1, f"pad_to_multiple_of must be at least 1; it is {multiple}.")
    cut, pad_to = _lengths(padding, truncation, max_length)
    end = [] if eos_id is None else [eos_id]
    rows = [encode(text) for text in ([texts] if one else texts)]
    if cut is not None:
        check(cut >= len(end), f"max_length={cut} has no room for the EOS token; it must be at least {len(end)}.")
        rows = [ids[: cut - len(end)] for ids in rows]
    rows = [ids + end for ids in rows]
    masks = [[1] * len(ids) for ids in rows]
    if pad_to is not None:
        length = max(map(len, rows), default=0) if pad_to < 0 else pad_to
        length = -(-length // multiple) * multiple
        rows, masks = ([row + [fill] * (length - len(row)) for row in part] for part, fill in ((rows, pad_id), (masks, 0)))
    return (rows[0], masks[0]) if one else (rows, masks)


def as_arrays(encoding: Encoding, return_tensors: str | None) -> Encoding:
    """Returns an encoding as it is, or with arrays [rows, tokens] for "np"; raises `ConfigError` for rows of different lengths."""
    if return_tensors is None:
        return encoding
    check(
        return_tensors == "np",
        f"return_tensors={return_tensors!r} is not made here; 'np' is, which JAX and torch take. Without it come lists.",
    )
    arrays = {}
    for name, value in encoding.items():
        rows = value if not value or isinstance(value[0], list) else [value]
        check(
            len({len(row) for row in rows}) <= 1,
            f"{name} has rows of different lengths, which no array holds; pass padding=True, and truncation=True with "
            "max_length=... to cut the long ones.",
        )
        arrays[name] = np.asarray(rows, np.int64)
    return Encoding(arrays)


def _lengths(padding: bool | str, truncation: bool | str, max_length: int | None) -> tuple[int | None, int | None]:
    """Returns the length to cut at, or None, and the length to pad to: None for no padding, -1 for the longest row's."""
    pads: Any = {True: "longest", False: "do_not_pad", None: "do_not_pad"}.get(padding, padding)
    one_of("padding (True, False or a name)", pads, PADDING)
    cuts = truncation in (True, "longest_first", "only_first")
    check(
        cuts or truncation in (False, None, "do_not_truncate"),
        f"truncation must be True or False; it is {truncation!r}. True cuts texts to max_length, EOS included.",
    )
    check(max_length is None or max_length >= 0, f"max_length must not be negative; it is {max_length}.")
    check(
        max_length is not None or (not cuts and pads != "max_length"),
        f"{'truncation' if cuts else 'padding'} to which length? Give max_length, a number of tokens.",
    )
    check(
        max_length is None or cuts or pads == "max_length",
        f"max_length={max_length} does nothing alone; add truncation=True to cut to it, or padding='max_length' to fill up to it.",
    )
    return (max_length if cuts else None), ({"longest": -1, "max_length": max_length}.get(pads))


def rows_of(sequences: Any) -> Iterator[Any]:
    """Yields the rows of sequences of ids [rows, tokens]: lists, or the arrays of any library."""
    for row in sequences:
        check(hasattr(row, "__iter__") and not isinstance(row, str), "batch_decode takes rows of ids; for one row use decode.")
        yield row
