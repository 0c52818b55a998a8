"""Held-out sentences with a gap, filled in by a model of a pre-training run, beside the truth and beside a control.

    python benchmarks/heldout_lines.py runs/tiny

Sentences are drawn from the held-out part of the embedded corpus by --seed, and of each a word within is masked. Counted are
outputs that keep every word before and after the gap in its order, and fills that change with the input: the model is given the
text before the gap and completes the gap with its own sentence as inputs, and again with another sentence's in their place. Where
both are the same the decoder made its fill of what came before alone. Counted are also outputs that are the sentence itself, beside
those that the most frequent of the masked words, always filled in, would make. Prints a table for docs/pretraining.md and writes
--output.
"""

from __future__ import annotations

import argparse
import collections
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import run_record

import flax_switch
from flax_switch.config import DataConfig
from flax_switch.data import cache, corpus
from flax_switch.host.files import cache_folder
from flax_switch.training.checkpoint import read_config

GAP = "<extra_id_0>"
MARKS = ".,;:!?()'"


def drawn(config: DataConfig, args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Returns so many held-out sentences as (text before the gap, the masked word, text after it), the same for any vocabulary."""
    documents = corpus.default_corpus(Path(cache_folder(config.cache_dir)))
    heldout = [document for document in documents if cache.is_heldout(document, config.heldout_fraction)]
    found = {sentence for document in heldout for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", document)}
    fitting = [s for s in sorted(found) if s[0].isupper() and args.shortest <= len(s) <= args.longest]
    random, parts = np.random.default_rng(args.seed), []
    for i in random.permutation(len(fitting)):
        words = fitting[i].split()
        within = [k for k, word in enumerate(words[1:-1], 1) if word.isalpha() and len(word) > 2]
        if within and len(parts) < args.lines:
            k = int(random.choice(within))
            parts.append((" ".join(words[:k]), words[k], " ".join(words[k + 1 :])))
    return parts


def padded(rows: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns token ids as rows of one length, and their mask."""
    ids, mask = (np.zeros((len(rows), length), np.int32) for _ in range(2))
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return ids, mask


def fills(pretrained: Any, before: list[list[int]], inputs: np.ndarray, mask: np.ndarray, count: int) -> list[str]:
    """Returns what comes next by greedy choice, up to the word's end or `count` pieces, after each row's text before the gap."""
    run = jax.jit(lambda params, *fed: pretrained.model.apply({"params": params}, *fed).logits.argmax(-1))
    rows = [[0, *row] for row in before]
    length = max(map(len, rows)) + count
    for _ in range(count):
        fed, _ = padded(rows, length)
        best = np.asarray(run(pretrained.params, inputs, fed, mask, np.ones_like(fed)))
        rows = [[*row, int(best[i, len(row) - 1])] for i, row in enumerate(rows)]
    decode = pretrained.vocabulary.decode
    made = [decode(row[1:])[len(decode(row[1 : len(start) + 1])) :] for row, start in zip(rows, before, strict=True)]
    return [" ".join(text.split()[:1]) for text in made]


def keeps(output: str, shown: str) -> bool:
    """Returns whether all words that were shown are in the output, in their order; marks at the ends of words aside."""
    words = iter([word.strip(MARKS) for word in output.split()])
    return all(word.strip(MARKS) in words for word in shown.split())


def main() -> None:
    """Prints the table and the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--lines", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shortest", type=int, default=25, help="characters of a sentence")
    parser.add_argument("--longest", type=int, default=80)
    parser.add_argument("--beams", type=int, default=4, help="1: greedy")
    parser.add_argument("--output", type=Path, default=run_record.RESULTS / "heldout_lines.json")
    args = parser.parse_args()
    config, pretrained = read_config(args.run).data, flax_switch.load_pretrained(args.run)
    assert isinstance(config, DataConfig), "it is no run of pre-training"
    vocabulary = pretrained.vocabulary
    parts = drawn(config, args)
    lines = [f"{before} {GAP} {after}" for before, _, after in parts]
    inputs, mask = padded([[*vocabulary.encode(line), vocabulary.eos_id] for line in lines], config.inputs_length)
    made = pretrained.generate(jnp.asarray(inputs), jnp.asarray(mask), max_new_tokens=config.targets_length, num_beams=args.beams)
    outputs = [vocabulary.decode(row[row > 1].tolist(), skip_special_tokens=False) for row in np.asarray(made.sequences)]
    starts = [vocabulary.encode(before) for before, _, _ in parts]
    own = fills(pretrained, starts, inputs, mask, 8)
    other = fills(pretrained, starts, np.roll(inputs, 1, 0), np.roll(mask, 1, 0), 8)
    rows = [
        dict(
            input=line, output=output, truth=" ".join(part), kept=keeps(output, f"{part[0]} {part[2]}"),
            right=output.split() == " ".join(part).split(), fill=mine, fill_with_another_input=others,
        )
        for part, line, output, mine, others in zip(parts, lines, outputs, own, other, strict=True)
    ]  # fmt: skip
    print("| input | output | truth | fill: own input, another's |\n|---|---|---|---|")
    for row, (_, word, _) in zip(rows, parts, strict=True):
        pair = f"{row['fill']}, {row['fill_with_another_input']}"
        cells = (row["input"].replace(GAP, "[..]"), row["output"], word, pair)
        print(f"| {' | '.join(cell.replace('|', '/').replace('<', '&lt;') for cell in cells)} |")
    kept = sum(row["kept"] for row in rows)
    changed = sum(row["fill"] != row["fill_with_another_input"] for row in rows)
    right = sum(row["right"] for row in rows)
    [(word, always)] = collections.Counter(word for _, word, _ in parts).most_common(1)
    print(f"\n{kept} of {len(rows)} outputs keep every word of the input; {changed} fills change with the input.")
    print(f"{right} are the sentence itself, where {word!r} in every gap would make {always}.")
    counts = {"beams": args.beams, "kept": kept, "changed": changed, "right": right, "right_by_most_frequent_word": always}
    run_record.write(args.output, counts | {"lines": rows})


if __name__ == "__main__":
    main()
