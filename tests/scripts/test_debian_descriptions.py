"""The data script on small archives made up here: what becomes a pair, what is left out, and that families stay together."""

import bz2
import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "data" / "debian_descriptions.py"
spec = importlib.util.spec_from_file_location("debian_descriptions", SCRIPT)
script = importlib.util.module_from_spec(spec)
sys.modules["debian_descriptions"] = script  # its dataclass looks itself up there
spec.loader.exec_module(script)

NOUNS = (
    "lamp",
    "river",
    "stone",
    "wheel",
    "garden",
    "mirror",
    "candle",
    "harbour",
    "ladder",
    "bottle",
    "needle",
    "kettle",
    "ribbon",
    "anchor",
    "basket",
    "feather",
)
VERBS = ("paints", "sorts", "mends", "counts", "stacks", "folds", "washes", "lifts", "bends", "joins")


def prose(seed, sentences=3):
    draw = random.Random(seed)
    made = (f"It {draw.choice(VERBS)} the {' '.join(draw.sample(NOUNS, 6))} number {draw.randrange(99)}." for _ in range(sentences))
    return " ".join(made)


def stanza(package, synopsis, paragraphs, language="en", md5=None):
    lines = [f"Package: {package}", f"Description-md5: {md5 or package}", f"Description-{language}: {synopsis}"]
    return "\n".join([*lines, "\n .\n".join(f" {p}" for p in paragraphs)]) + "\n\n"


@pytest.fixture
def archive(tmp_path):
    """A folder of index files: 120 programs, each with a library of its own source, a copy in another, and translations."""
    english, italian, packages = [], [], []
    for i in range(120):
        name, text = f"{NOUNS[i % 16]}{VERBS[i % 10]}{i}", prose(i)
        paragraphs = [f"Program {name} is for everybody. {text}", f"It needs {name} to run."]
        english.append(stanza(f"{name}-tool", f"tool of {name}", paragraphs))
        english.append(stanza(f"lib{name}", f"library of {name}", [f"Library {name} is for programs. {prose(2000 + i)}"]))
        english.append(stanza(f"copy-{i}", f"another {name}", [f"Copy {i} is for everybody. {text}"]))
        packages.append(f"Package: {name}-tool\nVersion: 1\n\nPackage: lib{name}\nSource: {name}-tool (1.0)\nVersion: 1\n\n")
        italian.append(stanza(f"{name}-tool", f"strumento {name}", [f"uno {p}" for p in paragraphs], "it", f"{name}-tool"))
    folder = tmp_path / "lists"
    folder.mkdir()
    (folder / "x_main_i18n_Translation-en.bz2").write_bytes(bz2.compress("".join(english).encode()))
    (folder / "x_main_i18n_Translation-it").write_text("".join(italian))
    (folder / "x_main_binary-amd64_Packages").write_text("".join(packages))
    (folder / "x_InRelease").write_text("Origin: Elsewhere\nCodename: made-up\n")
    return folder


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_families_are_in_one_split_in_every_file_and_no_synopsis_is_in_the_text_to_pre_train_on(archive, tmp_path):
    out = tmp_path / "out"
    result = subprocess.run(
        [sys.executable, str(SCRIPT), str(out), "--files", str(archive), "--languages", "it"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    split = {}
    for name in ("train", "validation", "test"):
        for folder in ("summarization", "translation/en-it"):
            for record in records(out / folder / f"{name}.jsonl"):
                assert split.setdefault(record["package"], name) == name
    assert len(split) > 300 and len(set(split.values())) == 3
    for i in range(120):
        name = f"{NOUNS[i % 16]}{VERBS[i % 10]}{i}"
        assert split[f"{name}-tool"] == split[f"lib{name}"] == split[f"copy-{i}"]  # the source; a near copy
    corpus = (out / "corpus" / "en.txt").read_text()
    for package, where in split.items():
        if package.startswith("lib"):
            assert (f"Library {package[3:]} " in corpus) == (where == "train")
    assert "tool of" not in corpus
    assert "Codename made-up" in (out / "README.md").read_text()


def test_the_same_archive_gives_the_same_files(archive, tmp_path):
    for name in ("once", "again"):
        script.build(script.Archive(archive), tmp_path / name, ["it"], say=lambda text: None)
    for path in (p for p in (tmp_path / "once").rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "once")).read_bytes()


def test_a_description_is_a_synopsis_and_paragraphs():
    text = "a tool\n It does\n one thing,  well.\n .\n Lists:\n  * are\n  * joined"
    assert script.synopsis_and_paragraphs(text) == ("a tool", ("It does one thing, well.", "Lists: * are * joined"))


def test_of_packages_whose_descriptions_begin_alike_one_is_a_pair():
    text = "The same program in several packages. What follows is about the documentation, at some length."
    entries = [
        script.Entry("program-doc", "1", "a program (manual)", (text,)),
        script.Entry("program", "2", "a program", (text.replace("documentation", "program"),)),
        script.Entry("short", "3", "too short", ("A few words.",)),
        script.Entry("another-program", "4", "A program", ("Another description, but the same synopsis, letter case aside.",)),
        script.Entry("word", "5", "word", ("A synopsis of a single word says nothing about this long description.",)),
    ]
    assert [pair["package"] for pair in script.summaries(entries)] == ["program"]


def test_paragraphs_are_paired_where_their_numbers_agree_and_nothing_untranslated_or_repeated_is_kept():
    entries = [
        script.Entry("a", "a", "a small tool", ("First paragraph.", "Second paragraph.")),
        script.Entry("b", "b", "a large tool", ("First paragraph.",)),
        script.Entry("c", "c", "an untranslated tool", ("Third paragraph.",)),
        script.Entry("d", "d", "a tool that is missing", ("Fourth paragraph.",)),
    ]
    foreign = {
        "a": ("piccolo strumento", ("Primo paragrafo.", "Secondo paragrafo.")),
        "b": ("grande strumento", ("Primo.", "Troppo.")),
        "c": ("an untranslated tool", ("<trans>",)),
    }
    pairs = [(pair["en"], pair["it"]) for pair in script.translations(entries, foreign, "it")]
    assert pairs == [
        ("a small tool", "piccolo strumento"),
        ("First paragraph.", "Primo paragrafo."),
        ("Second paragraph.", "Secondo paragrafo."),
        ("a large tool", "grande strumento"),
    ]


def test_near_copies_are_those_that_share_half_of_their_word_triples():
    texts = [prose(1, 6), prose(2, 6), prose(1, 6).replace("number", "no"), prose(1, 5) + " And more."]
    shingles = [script.triples(text) for text in texts]
    near = {(i, j) for j in range(4) for i in range(j) if len(shingles[i] & shingles[j]) * 2 >= len(shingles[i] | shingles[j])}
    assert near and set(script.near_copies(texts)) == near


def test_a_shared_beginning_is_a_family_and_a_crowded_one_a_namespace():
    sources = [f"golang-{i}x" for i in range(40)] + ["llvm-toolchain-14", "llvm-toolchain-15"]
    counts = script.collections.Counter(prefix for source in sources for prefix in script._prefixes(source))
    assert script.stem("llvm-toolchain-14", counts) == script.stem("llvm-toolchain-15", counts) == "llvm"
    assert script.stem("golang-1x", counts) == "golang-1x"


def test_without_apt_the_script_says_what_to_do(tmp_path):
    (tmp_path / "bin").mkdir()
    command = [sys.executable, str(SCRIPT), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(tmp_path / "bin")})
    assert result.returncode == 1 and "There is no apt here. Elsewhere than on Debian" in result.stderr
    result = subprocess.run([*command, "--files", str(tmp_path / "bin")], capture_output=True, text=True)
    assert result.returncode == 1 and "No English descriptions were found" in result.stderr
