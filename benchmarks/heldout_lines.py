"""Held-out sentences with gaps, filled in by a model of a pre-training run, beside the truth and beside a control.

    python benchmarks/heldout_lines.py runs/tiny

Sentences are drawn from the run's held-out text by --seed; each has --gaps gaps of two to four pieces. Counted are outputs
that hold everything that the input shows, in its order, and first fills that change with the input: the model is given the text
before the first gap and completes the gap with its own sentence as inputs, and again with another sentence's in their place. Where
both are the same the decoder made its fill of what came before alone. Prints a table for docs/pretraining.md and writes --output.
"""

from __future__ import annotations

import argparse
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
from flax_switch.data.batches import pad_batch
from flax_switch.data.infilling import infill
from flax_switch.data.random_bits import example_keys
from flax_switch.data.vocabulary import Vocabulary
from flax_switch.training.checkpoint import read_config
from flax_switch.workflows.finish import fills

SHORTEST, LONGEST = 30, 56  # tokens of a sentence


def sentences(config: DataConfig, vocabulary: Vocabulary, count: int, seed: int) -> list[list[int]]:
    """Returns token ids of so many held-out sentences of the embedded corpus."""
    documents = corpus.default_corpus(Path(cache.files.cache_folder(config.cache_dir)))
    heldout = [document for document in documents if cache.is_heldout(document, config.heldout_fraction)]
    found = {sentence for document in heldout for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", document)}
    encoded = map(vocabulary.encode, sorted(found))
    fitting = [ids for ids in encoded if SHORTEST <= len(ids) <= LONGEST]
    return [fitting[i] for i in np.random.default_rng(seed).permutation(len(fitting))[:count]]


def first_fills(pretrained: Any, batch: dict[str, np.ndarray], inputs: np.ndarray, mask: np.ndarray, gaps: np.ndarray) -> list[str]:
    """Completes each row's first gap (begin, end) greedily, after the true text before it, with the given inputs."""
    run = jax.jit(lambda params, *fed: pretrained.model.apply({"params": params}, *fed).logits.argmax(-1))
    fed, filled = batch["decoder_input_ids"].copy(), np.zeros_like(batch["labels"])
    ones = np.ones_like(fed)
    for place in range(int((gaps[:, 1] - gaps[:, 0]).max())):
        best = np.asarray(run(pretrained.params, inputs, fed, mask, ones))
        at = gaps[:, 0] + place
        rows = np.flatnonzero(at < gaps[:, 1])
        filled[rows, at[rows]] = best[rows, at[rows]]
        fed[rows, np.minimum(at[rows] + 1, fed.shape[1] - 1)] = best[rows, at[rows]]
    return [pretrained.vocabulary.decode(row[begin:end].tolist()) for row, (begin, end) in zip(filled, gaps, strict=True)]


def main() -> None:
    """Prints the table and the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--lines", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gaps", type=int, default=1)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--output", type=Path, default=run_record.RESULTS / "heldout_lines.json")
    args = parser.parse_args()
    config, pretrained = read_config(args.run).data, flax_switch.load_pretrained(args.run)
    assert isinstance(config, DataConfig), "it is no run of pre-training"
    vocabulary = pretrained.vocabulary
    ids = sentences(config, vocabulary, args.lines, args.seed)
    lengths = np.asarray([len(row) for row in ids])
    tokens = np.zeros((len(ids), lengths.max()), np.int32)
    for row, sentence in zip(tokens, ids, strict=True):
        row[: len(sentence)] = sentence
    examples = infill(
        tokens, lengths, example_keys(args.seed, np.zeros_like(lengths), np.arange(len(ids))),
        top_sentinel=vocabulary.num_pieces + vocabulary.num_sentinels - 1, noise_density=3 * args.gaps / lengths.mean(),
        mean_noise_span_length=3.0,
    )  # fmt: skip
    batch = pad_batch(examples, config.inputs_length, config.targets_length)
    inputs, mask = batch["input_ids"], batch["attention_mask"]
    outputs = np.asarray(
        pretrained.generate(
            jnp.asarray(inputs), jnp.asarray(mask), max_new_tokens=config.targets_length, num_beams=args.beams
        ).sequences
    )
    begins = examples.hidden.argmax(1)
    gaps = np.stack([begins, [b + np.argmin(np.r_[row[b:], False]) for row, b in zip(examples.hidden, begins, strict=True)]], 1)
    own = first_fills(pretrained, batch, inputs, mask, gaps)
    other = first_fills(pretrained, batch, np.roll(inputs, 1, 0), np.roll(mask, 1, 0), gaps)
    rows = []
    for i, (source, output) in enumerate(zip(inputs, outputs, strict=True)):
        rows.append(dict(
            input=vocabulary.decode(source[source > 1].tolist(), skip_special_tokens=False),
            output=vocabulary.decode(output[output > 1].tolist(), skip_special_tokens=False), truth=vocabulary.decode(ids[i]),
            keeps=fills(vocabulary, source, output) is not None, first_fill=own[i], first_fill_with_another_input=other[i],
            first_gap=vocabulary.decode(ids[i][gaps[i, 0] : gaps[i, 1]]),
        ))  # fmt: skip
    print("| input | output | truth | first gap: own input, another's |\n|---|---|---|---|")
    for row in rows:
        shown = re.sub(r" ?<extra_id_\d+>", " [..]", row["input"]).strip()
        cells = (shown, row["output"], row["truth"], f"`{row['first_fill']}`, `{row['first_fill_with_another_input']}`")
        print(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    kept = sum(row["keeps"] for row in rows)
    changed = sum(row["first_fill"] != row["first_fill_with_another_input"] for row in rows)
    print(f"\n{kept} of {len(rows)} outputs keep all that the input shows; {changed} first fills change with the input.")
    run_record.write(args.output, {"kept": kept, "changed": changed, "lines": rows})


if __name__ == "__main__":
    main()
