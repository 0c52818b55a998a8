"""Small files and checkpoints of the kinds that documented commands name, each written when a command first asks for it."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

PIECES, VOCAB_SIZE = 200, 384  # pieces of a vocabulary; with 100 sentinels, rounded up
_SYLLABLES = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences of made-up words."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(_SYLLABLES, rng.integers(1, 4))) for _ in range(400)]
    return [" ".join(rng.choice(words, rng.integers(4, 14))).capitalize() + "." for _ in range(count)]


def text(path: Path) -> None:
    """Plain text, a document a line; compressed where the name says so."""
    path.write_text("\n".join(sentences(300)) + "\n", encoding="utf-8")


def c4(folder: Path) -> None:
    """Two shards as C4's: JSON lines in .json.gz."""
    folder.mkdir()
    for shard in range(2):
        with gzip.open(folder / f"c4-train.{shard:05d}-of-00002.json.gz", "wt", encoding="utf-8") as file:
            for line in sentences(200, shard):
                file.write(json.dumps({"text": line, "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org"}) + "\n")


def vocabulary():
    """A SentencePiece vocabulary of the made-up language."""
    from flax_switch.data import Vocabulary

    return Vocabulary.train(sentences(400), PIECES)


def sentencepiece_model(path: Path) -> None:
    """spiece.model alone."""
    path.write_bytes(vocabulary().model)


def records(*fields: str, count: int = 40) -> Callable[[Path], None]:
    """JSON lines with these fields."""

    def write(path: Path) -> None:
        columns = [sentences(count, seed) for seed in range(len(fields))]
        rows = (dict(zip(fields, row, strict=True)) for row in zip(*columns, strict=True))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    return write


def sst2(folder: Path) -> None:
    """Tables with the columns sentence and label."""
    folder.mkdir()
    for name, seed in (("train", 0), ("dev", 1)):
        rows = (f"{sentence}\t{number % 2}\n" for number, sentence in enumerate(sentences(40, seed)))
        (folder / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(rows), encoding="utf-8")


def squad(folder: Path) -> None:
    """Parquet with SQuAD's records."""
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    for name, seed in (("train", 0), ("validation", 1)):
        rows = [
            {"question": question, "context": context, "answers": {"text": [context.split()[0]], "answer_start": [0]}}
            for question, context in zip(sentences(40, seed), sentences(40, seed + 5), strict=True)
        ]
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{name}.parquet")


def parallel(folder: Path) -> None:
    """Plain parallel text."""
    folder.mkdir()
    for name in ("train", "dev"):
        for language, seed in (("en", 0), ("de", 1)):
            (folder / f"{name}.{language}").write_text("\n".join(sentences(40, seed)) + "\n", encoding="utf-8")


def debian(folder: Path) -> None:
    """What scripts/data/debian_descriptions.py writes, by its docstring."""
    kinds = {
        "summarization": ("package", "description", "synopsis"),
        "translation/en-it": ("package", "en", "it"),
        "translation/en-it/synopses": ("package", "en", "it"),
    }
    for kind, fields in kinds.items():
        (folder / kind).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            records(*fields)(folder / kind / f"{split}.jsonl")
    (folder / "corpus").mkdir()
    for language in ("en", "it", "fr", "de", "ru", "es", "fi"):
        text(folder / "corpus" / f"{language}.txt")


def huggingface(sparse: bool) -> Callable[[Path], None]:
    """A small model in Hugging Face's format, sparse or dense."""

    def write(path: Path) -> None:
        import jax

        import flax_switch as fs
        from flax_switch.nn.init import init_params

        layers = int(sparse)
        config = fs.SwitchConfig(
            vocab_size=VOCAB_SIZE, d_model=16, num_heads=2, d_kv=8, d_ff=32, num_encoder_layers=2, num_decoder_layers=2,
            num_sparse_encoder_layers=layers, num_sparse_decoder_layers=layers, num_experts=8,
        )  # fmt: skip
        params = init_params(fs.SwitchTransformer(config), jax.random.key(0))
        fs.save_pretrained(path, config, params, vocabulary(), format="huggingface")

    return write


def nllb(path: Path) -> None:
    """A small NLLB-MoE with a tokenizer of three languages."""
    import jax
    import tokenizers

    import flax_switch as fs
    from flax_switch.data.foreign_vocabulary import ForeignVocabulary

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=PIECES, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(sentences(100), trainer)
    tokenizer.add_special_tokens(["eng_Latn", "fra_Latn", "zho_Hans"])
    values = dict(
        model_type="nllb-moe", vocab_size=VOCAB_SIZE, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_experts=4, encoder_sparse_step=2,
        decoder_sparse_step=2,
    )  # fmt: skip
    config = fs.SwitchConfig.from_huggingface(values)
    vocabulary = ForeignVocabulary(tokenizer.to_str().encode())
    fs.save_pretrained(path, config, fs.init_params(config, jax.random.key(0)), vocabulary, format="huggingface")


FILES: dict[str, Callable[[Path], None]] = {
    "c4": c4,
    "spiece.model": sentencepiece_model,
    "text.txt": text,
    "lines.txt": lambda path: path.write_text("Returns True if the <extra_id_0> is empty.\nBa <extra_id_0>.\n"),
    "train.jsonl": records("document", "summary"),
    "validation.jsonl": records("document", "summary"),
    "test.jsonl": records("document", "summary"),
    "numbers.csv": lambda path: path.write_text("number,kind\n" + "".join(f"twenty {n},{n}\n" for n in "abcdefghijklmnopqrst")),
    "own.csv": lambda path: path.write_text("text,answer\n" + "".join(f"The cat is in {p}.,{p}\n" for p in "abcdefghijklmnopqrst")),
    "sst2": sst2,
    "squad": squad,
    "corpus": parallel,
    "data/debian": debian,
    "google/switch-base-8": huggingface(sparse=True),
    "google-t5/t5-base": huggingface(sparse=False),
    "nllb": nllb,
}


class Store:
    """The stand-ins of a session: each is made once, and copied to where a command runs."""

    def __init__(self, folder: Path):
        self.folder = folder

    def copy(self, name: str, destination: Path) -> None:
        """Puts a stand-in at `destination`/`name`."""
        made = self.folder / name
        if not made.exists():
            made.parent.mkdir(parents=True, exist_ok=True)
            FILES[name](made)
        place(made, destination / name)


def place(source: Path, destination: Path) -> None:
    """Copies a file or a folder, unless it is there."""
    if destination.exists():
        return
    destination.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, destination)
    else:
        shutil.copyfile(source, destination)
