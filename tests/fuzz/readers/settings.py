"""Recipes, gin files, overrides and values of settings."""

import dataclasses
import random
from pathlib import Path

from flax_switch.config.finetuning import FinetuneRecipe
from flax_switch.config.generation import GenerationConfig, make_controls
from flax_switch.config.kinds import RECIPES
from flax_switch.config.recipes import load_gin, load_recipe
from flax_switch.config.shipped import folder as recipes_folder
from flax_switch.convert.folder import parse_size
from flax_switch.plan.topology import parse_topology
from tests.fuzz.case import Reader
from tests.fuzz.mutations import NUMBERS, VALUES
from tests.fuzz.readers.models import SMALL

SHIPPED = ("tiny", "finetune_summarization", "distill_tiny", "switch_base_128")
WORDS = (
    "", "0", "-1", "1", "nan", "inf", "1e400", "9" * 30, "9" * 5000, "0x" + "f" * 9000, "[" * 500, "(1,", "None", "true", "'a'",
    '"', "{}", "{1: 2}", "[1, 'a']", "((1,),)", "\x00", "\udc80", "é", "a=b", "=", "..", "/", "-", "--", "x" * 300, "1_000", "b'x'",
    "1j",
)  # fmt: skip


def fields() -> list[str]:
    """section.field of every kind of recipe."""
    found = []
    for recipe in RECIPES.values():
        for section in dataclasses.fields(recipe):
            if isinstance(section.default_factory, type) and dataclasses.is_dataclass(section.default_factory):
                found += [f"{section.name}.{one.name}" for one in dataclasses.fields(section.default_factory)]
    return found


FIELDS = fields()


def words(rng: random.Random) -> str:
    """A value as somebody may write it."""
    return rng.choice((rng.choice(WORDS), str(rng.randint(-3, 99)), repr(rng.choice(NUMBERS[:8])), repr(rng.choice(VALUES))))


def _overrides(place: Path, rng: random.Random) -> None:
    names = [
        rng.choice((*FIELDS, "model", "model.", ".x", "data.x.y", "kind", "x.y", "", words(rng)))
        for _ in range(rng.choice((1, 1, 2)))
    ]
    load_recipe(rng.choice(SHIPPED), [name + rng.choice(("=", "=", "=", "", "==")) + words(rng) for name in names])


def _recipe(folder: Path) -> None:
    (folder / "recipe.py").write_bytes((recipes_folder() / "tiny.py").read_bytes())


def _gin(folder: Path) -> None:
    (folder / "recipe.gin").write_text(
        "recipe.base = 'tiny'\ntrain.steps = 500\nmodel.num_experts = 4\n# words\ndata.seed = %x\nx = 3\n"
    )


def _read_gin(folder: Path, rng: random.Random) -> None:
    bindings = [f"{rng.choice(FIELDS)} = {words(rng)}"] if rng.random() < 0.3 else []
    load_gin([folder / "recipe.gin"], bindings)


def _controls(place: Path, rng: random.Random) -> None:
    names = rng.sample([one.name for one in dataclasses.fields(GenerationConfig)], rng.choice((1, 1, 2, 3)))
    make_controls({name: rng.choice((*NUMBERS, *VALUES, 1, 2, 0.5, True)) for name in names}, SMALL)


def _fields(place: Path, rng: random.Random) -> None:
    recipe = rng.choice(list(RECIPES.values()))
    values = recipe().to_dict()
    holder, key = values, rng.choice(list(values))
    while isinstance(holder[key], dict) and holder[key] and rng.random() < 0.9:
        holder = holder[key]
        key = rng.choice(list(holder))
    holder[key] = rng.choice((*NUMBERS, *VALUES))
    made = recipe.from_dict(values)
    if isinstance(made, FinetuneRecipe):
        made.resolve(SMALL)


def _words(place: Path, rng: random.Random) -> None:
    text = rng.choice((words(rng), f"{words(rng)}GB", f"v5e:{words(rng)}", f"cpu:{words(rng)}", f"h100:{words(rng)}x{words(rng)}"))
    rng.choice((parse_size, parse_topology))(text)


def _nothing(folder: Path) -> None:
    folder.mkdir(exist_ok=True)


READERS = {
    "overrides": Reader(_nothing, _overrides),
    "recipe": Reader(_recipe, lambda folder, rng: load_recipe(folder / "recipe.py")),
    "gin": Reader(_gin, _read_gin),
    "controls": Reader(_nothing, _controls),
    "fields": Reader(_nothing, _fields),
    "sizes-and-topologies": Reader(_nothing, _words),
}
