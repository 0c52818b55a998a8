"""Adapters are served by names of their own, beside a model whose arrays they share; each says what `generate` does."""

import concurrent.futures
import dataclasses
import sys
from pathlib import Path

import jax
import pytest
from client import LIMITS, Running, alone, requests, small_model

sys.path.insert(0, str(Path(__file__).parents[1] / "pretrained"))
from drawn_adapters import drawn  # noqa: E402

import flax_switch as fs  # noqa: E402
from flax_switch.config import ConfigError  # noqa: E402
from flax_switch.convert import CheckpointError  # noqa: E402
from flax_switch.nn.adapter import has_adapter  # noqa: E402
from flax_switch.ops.kernels.adapted import Adapted  # noqa: E402
from flax_switch.serving.loading import Asked, load, parse_models  # noqa: E402
from flax_switch.serving.models import Served  # noqa: E402

KINDS = {"fr": dict(router=False), "de": dict(rank=2, use_dora=True, targets="attention,experts")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, an adapter in PEFT's format, experts included, and one in ours."""
    folder, base = tmp_path_factory.mktemp("served"), small_model()
    base.save_pretrained(folder / "base", format="flax_switch")
    small_model(1).save_pretrained(folder / "other", format="flax_switch")
    for (name, settings), format in zip(KINDS.items(), ("peft", "flax_switch"), strict=True):
        base.with_adapter(drawn(base, len(name), **settings)).save_adapter(folder / name, format=format)
    return folder


@pytest.fixture(scope="module")
def models(folder):
    texts = [f"fr={folder / 'fr'}", f"base={folder / 'base'}", f"de=base+{folder / 'de'}"]
    return load(parse_models(texts), changes={"scan_layers": False})


def buffers(tree):
    """Where the arrays of a tree lie, but for adapters'; a part of an array lies at its own place in it."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, Adapted))
    return [(leaf.base if isinstance(leaf, Adapted) else leaf).unsafe_buffer_pointer() for leaf in leaves]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_array_of_the_model_is_there_twice(dtype):
    base = small_model(dtype=dtype)
    base = base.with_adapter({name: drawn(base, 1, **settings) for name, settings in KINDS.items()})
    first = Served("base", base.use_adapter(None), LIMITS)
    for name in KINDS:
        served = Served(name, base.use_adapter(name), LIMITS, like=first)
        own = served.decoder.variables
        assert has_adapter(own["params"]) and not has_adapter(first.decoder.variables)
        assert buffers(own["params"]) == buffers(first.decoder.variables["params"])
        if dtype == "float32":
            assert buffers(own["unstacked"]) == buffers(first.decoder.variables["unstacked"])
        again = Served("again", base.use_adapter(None), LIMITS, like=served)
        assert buffers(again.decoder.variables["params"]) == buffers(first.decoder.variables["params"])


@pytest.mark.slow
def test_a_model_and_its_adapters_say_what_generate_says_with_them_whoever_asks_beside(models, folder):
    base = fs.load_pretrained(folder / "base")
    expected = {"base": base, **{name: base.with_adapter(folder / name) for name in KINDS}}
    short = [(dict(body, prompt=body["prompt"][:24]), controls) for body, controls in requests(4)]
    asked = [(dict(body, model=name), controls) for body, controls in short for name in models]
    with Running(models, LIMITS.replace(slots=4, max_source_length=32)) as running:
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            found = list(pool.map(lambda one: running.client.texts(**one[0]), asked))
        for (body, controls), texts in zip(asked, found, strict=True):
            assert texts == alone(expected[body["model"]], body, controls), (body, controls)
        by_name = [found[i :: len(models)] for i in range(len(models))]
        assert all(one != other for i, one in enumerate(by_name) for other in by_name[:i]), "models can be told apart"
        decoders = [served.decoder for served in running.server.models.values()]
        assert len({tuple(buffers(decoder.variables["params"])) for decoder in decoders}) == 1, "one model"
        assert len({id(decoder._run) for decoder in decoders}) == 1, "whose programs are shared where shapes are"
        status, answer = running.client.post("/v1/routing", dict(model="de", input="the cat sat", output="on the mat"))
        assert status == 200 and len(answer["stacks"]) == 2
        said = [running.client.post("/v1/embeddings", dict(model=name, input="the cat"))[1]["data"] for name in models]
        assert said[0] != said[1] != said[2]


def test_an_adapters_prefix_is_put_before_its_texts():
    base = small_model().replace(prefixes=("x: ",))
    adapter = drawn(base, 1, rank=1, targets="attention")
    served = Served("it", base.with_adapter(dataclasses.replace(adapter, prefixes=("a: ",))), LIMITS)
    assert served.prefix == "a: "
    assert Served("it", base.with_adapter(adapter), LIMITS).prefix == "x: "


def test_an_adapter_names_its_model_where_there_are_several(folder):
    path = {name: str(folder / name) for name in ("base", "other", "fr", "de")}
    assert parse_models([path["base"], path["fr"]]) == {"base": Asked(path["base"]), "fr": Asked(path["fr"], "base")}
    asked = parse_models([f"x=base+{path['de']}", path["base"], path["other"]])
    assert asked == {"x": Asked(path["de"], "base"), "base": Asked(path["base"]), "other": Asked(path["other"])}
    for texts, said in {
        (path["fr"],): r"fr is an adapter, and no model is served .*: MODEL fr=",
        (path["base"], path["other"], path["fr"]): r"one of several models \(base, other\); say which: fr=base\+",
        (path["base"], path["fr"], f"x=fr+{path['de']}"): r"x=.* is an adapter of 'fr', which is an adapter itself",
        (path["base"], f"base={path['other']}"): r"Two models have one name \(base, base\)",
    }.items():
        with pytest.raises(ConfigError, match=said):
            parse_models(texts)


def test_what_is_no_adapter_of_the_model_is_refused_before_weights_are_read(folder, monkeypatch):
    monkeypatch.setattr("flax_switch.serving.loading.from_checkpoint", lambda *args, **options: 1 / 0)
    wrong = {
        "x": (folder / "de", "^x, for the model other: .*de is an adapter of another model, .*: its shapes fit, but"),
        "y": (folder / "base", "^y, for the model other: .*base holds no adapter that is known"),
    }
    for name, (path, said) in wrong.items():
        with pytest.raises(CheckpointError, match=said):
            load(parse_models([str(folder / "other"), f"{name}=other+{path}"]), changes={})
