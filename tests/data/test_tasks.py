"""Tasks from every kind of file, their splits and lengths, and errors that name file, line and what there is."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from flax_switch.config import ConfigError
from flax_switch.config.finetuning import FinetuneDataConfig, TaskConfig
from flax_switch.data.tasks import Example, prepare_tasks, read_task, spread

ROWS = [("ba ke", "lo"), ("mi, nu", 'ra "se"'), ("ti", "vo")]
DATA = FinetuneDataConfig(inputs="text", targets="short", prefix="cut: ", validation_fraction=0.0)
EXPECTED = [Example(f"cut: {text}", (short,)) for text, short in ROWS]


def records():
    return [{"text": text, "short": short, "id": i} for i, (text, short) in enumerate(ROWS)]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def examples(data, **changes):
    data = data.replace(**changes)
    return read_task(data.mixture[0], data)


def write_jsonl(folder):
    return jsonl(folder / "a.jsonl", records())


def write_csv(folder):
    (folder / "a.csv").write_text('text,short,id\nba ke,lo,0\n"mi, nu","ra ""se""",1\nti,vo,2\n')
    return str(folder / "a.csv")


def write_tsv(folder):
    (folder / "a.tsv").write_text('text\tshort\tid\nba ke\tlo\t0\nmi, nu\tra "se"\t1\nti\tvo\t2\n')
    return str(folder / "*.tsv")


def write_parquet(folder):
    pyarrow.parquet.write_table(pa.Table.from_pylist(records()), folder / "a.parquet")
    return str(folder)


def write_dataset(folder):
    """What datasets' `DatasetDict.save_to_disk` leaves, in two shards."""
    split = folder / "train"
    split.mkdir()
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    (split / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    for name, part in zip(names, (records()[:2], records()[2:]), strict=True):
        table = pa.Table.from_pylist(part)
        with pa.OSFile(str(split / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return str(folder)


def write_parallel(folder):
    (folder / "corpus.text").write_text("".join(text + "\n" for text, _ in ROWS))
    with gzip.open(folder / "corpus.short.gz", "wt") as file:
        file.writelines(short + "\n" for _, short in ROWS)
    return str(folder / "corpus")


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_tsv, write_parquet, write_dataset, write_parallel])
def test_every_kind_of_file_gives_the_same_examples(write, tmp_path):
    assert examples(DATA, train=write(tmp_path)) == (EXPECTED, [])


def test_columns_go_by_number_where_a_table_has_no_header(tmp_path):
    (tmp_path / "a.tsv").write_text("x\tba\tlo\ny\tke\tmi\n")
    found, _ = examples(DATA, train=str(tmp_path / "a.tsv"), inputs=1, targets=2)
    assert found == [Example("cut: ba", ("lo",)), Example("cut: ke", ("mi",))]


def test_fields_may_be_nested_made_of_several_or_hold_several_answers(tmp_path):
    row = {"question": "who", "context": "ba ke", "answers": {"text": ["ba", "ke"]}, "de": {"x": "lo"}}
    path = jsonl(tmp_path / "a.jsonl", [row])
    fields = {"inputs": "question: {question} context: {context}", "targets": "answers.text", "prefix": ""}
    assert examples(DATA, train=path, **fields)[0] == [Example("question: who context: ba ke", ("ba", "ke"))]
    assert examples(DATA, train=path, inputs="de.x", targets="question")[0] == [Example("cut: lo", ("who",))]


def test_numbers_stand_for_labels(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "ba", "label": 1}, {"text": "ke", "label": "0"}])
    found, _ = examples(DATA, train=path, targets="label", labels=("bad", "good"))
    assert [e.references for e in found] == [("good",), ("bad",)]
    with pytest.raises(ConfigError, match=r"line 1: field 'label' must be a number below 1"):
        examples(DATA, train=path, targets="label", labels=("bad",))
    for wrong in (-1, "good", 0.5):
        path = jsonl(tmp_path / "b.jsonl", [{"text": "ba", "label": wrong}])
        with pytest.raises(ConfigError, match=r"line 1: field 'label' must be a number below 2"):
            examples(DATA, train=path, targets="label", labels=("bad", "good"))


def test_validation_is_a_file_or_a_share_that_stays_the_same_whatever_is_added(tmp_path):
    rows = [{"text": f"ba {i}", "short": "x"} for i in range(400)]
    small, large = jsonl(tmp_path / "small.jsonl", rows[:200]), jsonl(tmp_path / "large.jsonl", rows[::-1])
    train, validation = examples(DATA, train=small, validation_fraction=0.2)
    more_train, more_validation = examples(DATA, train=large, validation_fraction=0.2)
    assert set(validation) <= set(more_validation) and set(train) <= set(more_train)
    assert not set(more_train) & set(more_validation) and 50 < len(more_validation) < 110
    train, validation = examples(DATA, train=large, validation=small)
    assert (len(train), len(validation)) == (400, 200)


def test_what_is_too_long_is_cut_and_counted(tmp_path, vocabulary):
    rows = [{"text": "ba ke lo mi nu " * n, "short": "ba"} for n in (1, 1, 1, 40)]
    said = []
    data = DATA.replace(train=jsonl(tmp_path / "a.jsonl", rows), inputs_length=24, targets_length=8)
    prepared = prepare_tasks(data, vocabulary, say=said.append)
    (task,) = prepared.describe()
    assert task["train"] == {"examples": 4, "truncated_inputs": 0.25, "truncated_targets": 0.0}
    assert "4 training examples (too long and shortened: 25.0 % of inputs, 0.0 % of targets)" in said[0]
    assert (prepared.tasks[0].train.input_lengths <= 24).all()


def test_a_mixture_prepares_each_task_and_says_their_rates(tmp_path, vocabulary):
    a = jsonl(tmp_path / "a.jsonl", [{"text": f"ba {i}", "short": "x"} for i in range(30)])
    b = jsonl(tmp_path / "b.jsonl", [{"text": f"ke {i}", "short": "y"} for i in range(10)])
    tasks = tuple(TaskConfig(n, train=p, validation=p, inputs="text", targets="short") for n, p in (("a", a), ("b", b)))
    said = []
    data = FinetuneDataConfig(tasks=tasks, inputs_length=16, targets_length=4, batch_size=4)
    prepared = prepare_tasks(data, vocabulary, say=said.append)
    assert said[-1] == "Mixture of examples: a 75.0 %, b 25.0 %."
    assert next(prepared.train_iterator())["input_ids"].shape == (4, 16)
    assert prepared.num_validation == 40 and len(list(prepared.validation_batches())) == 10
    assert FinetuneDataConfig.from_dict(json.loads(json.dumps(data.to_dict()))) == data


@pytest.mark.parametrize(
    ("files", "changes", "message"),
    [
        ({}, {}, r"Say where the examples are: data.train=FILE"),
        ({}, {"train": "{tmp}/no.jsonl"}, r"data.train: .*no.jsonl' is no file or folder"),
        ({"a.md": "x"}, {"train": "{tmp}/a.md"}, r"a.md is of no kind that can be read; .* in .json, .jsonl.*.csv.*.gz or .zst"),
        ({"a.jsonl": '{"text": "x"}\n'}, {"train": "{tmp}/a.jsonl"},
         r"a.jsonl, line 1: there is no field 'short'; the fields are: text. Set data.targets to one of them"),
        ({"a.jsonl": '{"text": "x", "short": "y"}\n{"text": "x", "short": " "}\n'}, {"train": "{tmp}/a.jsonl"},
         r"a.jsonl, line 2: the targets are empty; mend the file, or set data.skip_empty=true"),
        ({"a.jsonl": '{"text": ["x"], "short": "y"}\n'}, {"train": "{tmp}/a.jsonl"}, r"'text' must be text; it is a list"),
        ({"a.jsonl": '{"text": "x", "short": []}\n'}, {"train": "{tmp}/a.jsonl"}, r"field 'short' is an empty list"),
        ({"a.jsonl": "\n"}, {"train": "{tmp}/a.jsonl"}, r"holds no example to train on"),
        ({"a.jsonl": "{nonsense\n"}, {"train": "{tmp}/a.jsonl"}, r"a.jsonl, line 1: not JSON"),
        ({"a.csv": "text,short\nx,y,z\n"}, {"train": "{tmp}/a.csv"}, r"a.csv, line 2: the row has 3 columns, but the first"),
        ({"a.csv": 'text,short\nx,"y"z\n'}, {"train": "{tmp}/a.csv"}, r"a.csv, line 2: this is no row of a .csv file"),
        ({"c.en": "x\ny\n", "c.de": "x\n"}, {"train": "{tmp}/c", "inputs": "en", "targets": "de"},
         r"c.en has 2 lines and .*c.de has 1"),
        ({"c.en": "x\n", "c.fr": "x\n"}, {"train": "{tmp}/c", "inputs": "en", "targets": "de"},
         r"there is no .*c.de. Beside it there are: c.en, c.fr"),
        ({"a.jsonl": '{"text": "x", "short": "y"}\n'}, {"train": "{tmp}/a.jsonl", "validation_fraction": 0.001},
         r"no example fell into the validation share of 0.1%"),
        ({"d/dataset_dict.json": '{"splits": ["test"]}'}, {"train": "{tmp}/d"}, r"has the splits test, and no 'train'"),
    ],
)  # fmt: skip
def test_mistakes_are_clear_errors(files, changes, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    changes = {k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(ConfigError, match=message):
        examples(DATA, **changes)


def test_empty_examples_can_be_left_out(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "x", "short": ""}, {"text": "x", "short": None}, {"text": "x", "short": "y"}])
    assert examples(DATA, train=path, skip_empty=True)[0] == [Example("cut: x", ("y",))]


def test_a_few_examples_are_spread_over_all():
    assert spread(range(100), 3) == [0, 50, 99]
    assert spread(range(3), None) == spread(range(3), 5) == [0, 1, 2]


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="with data.tasks each task names its own files"):
        FinetuneDataConfig(train="x", tasks=(TaskConfig("a"),))
    with pytest.raises(ConfigError, match="need different names"):
        FinetuneDataConfig(tasks=(TaskConfig("a"), TaskConfig("a")))
    assert FinetuneDataConfig(batch_tokens=4096, inputs_length=128).batch_size == 32
    with pytest.raises(ConfigError, match="must hold at least one row"):
        FinetuneDataConfig(batch_tokens=100)
