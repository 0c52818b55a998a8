"""The routing explorer shows what the model did, and its command prints and plots it."""

import dataclasses
import html
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from flax_switch.cli import main
from flax_switch.config import ConfigError, SwitchConfig
from flax_switch.data.vocabulary import Vocabulary
from flax_switch.inspection.page import write_page
from flax_switch.inspection.routing import explore, plot, render
from flax_switch.nn.init import init_params
from flax_switch.nn.transformer import SwitchTransformer
from flax_switch.pages.page import expert_color, ink_on
from flax_switch.pretrained import Pretrained, save_pretrained

sys.path.insert(0, str(Path(__file__).parents[1] / "pages"))
from browser import Browser  # noqa: E402

TEXTS = ["the cat sat on the mat", "a dog"]
TARGETS = ["<extra_id_0> the cat", "dog"]


@pytest.fixture(scope="module")
def pretrained():
    vocabulary = Vocabulary.train(["the cat sat on the mat and a dog ran after the cat"] * 30, 21, num_sentinels=4)
    config = SwitchConfig(
        vocab_size=64, d_model=16, num_heads=2, d_kv=8, d_ff=16, num_encoder_layers=2, num_decoder_layers=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=2, num_experts=4, num_selected_experts=2,
        capacity_mode="fixed", expert_capacity=4, dropout_rate=0.0, router_bias=True,
    )  # fmt: skip
    model = SwitchTransformer(config)
    params = init_params(model, jax.random.key(0))
    bias = params["encoder"]["layers_1"]["mlp"]["router"]["router_weights"]["w"]
    bias["bias"] = bias["bias"].at[2].set(9.0)  # every token wants expert 2, which takes four
    return Pretrained(config, model, params, vocabulary)


@pytest.fixture(scope="module")
def exploration(pretrained):
    return explore(pretrained, TEXTS, TARGETS)


def test_tokens_layers_and_choices_are_the_models(pretrained, exploration):
    vocabulary = pretrained.vocabulary
    for text, target, stacks in zip(TEXTS[1:], TARGETS[1:], exploration.texts[1:], strict=True):
        assert [stack.stack for stack in stacks] == ["encoder", "decoder"]
        ids = np.asarray([[*vocabulary.encode(text), vocabulary.eos_id]])
        answer = np.asarray([[0, *vocabulary.encode(target)]])
        output = pretrained.model.apply({"params": pretrained.params}, ids, answer)
        for stack, fed, routers in zip(stacks, (ids, answer), (output.encoder_router, output.decoder_router), strict=True):
            assert stack.tokens == [vocabulary.decode([i], skip_special_tokens=False) or "\u2581" for i in fed[0]]
            assert [layer.layer for layer in stack.layers] == list(getattr(pretrained.config, stack.stack).sparse_layers)
            for layer, router in zip(stack.layers, routers, strict=True):
                assert layer.chosen == router.expert_index[0].tolist()
                assert layer.kept == router.kept[0].tolist()


def test_loads_count_every_choice_once_and_show_the_crowded_expert(exploration):
    loads = exploration.loads()
    assert list(loads) == [("encoder", 1), ("decoder", 0), ("decoder", 1)]
    kept, dropped = loads["encoder", 1]
    tokens = [len(stacks[0].tokens) for stacks in exploration.texts]
    assert kept.sum() + dropped.sum() == 2 * sum(tokens)
    assert kept[2] == sum(min(n, 4) for n in tokens)
    assert dropped[2] == sum(max(n - 4, 0) for n in tokens)


def test_the_text_names_every_token_and_marks_what_was_dropped(exploration):
    text = render(exploration)
    for stacks in exploration.texts:
        for stack in stacks:
            for token in stack.tokens:
                assert token in text
    assert "2x" in text
    assert "encoder layer 1:" in text
    counted = [
        (sum(layer.dropped() for layer in stack.layers), sum(len(token) for layer in stack.layers for token in layer.chosen))
        for stacks in exploration.texts
        for stack in stacks
    ]
    told = re.findall(r"  (\d+) of (\d+) choices dropped; highest probability [01]\.\d\d on average", text)
    assert [tuple(map(int, pair)) for pair in told] == counted


def test_without_a_target_the_decoder_is_shown_with_the_models_own_answer(pretrained):
    encoder, decoder = explore(pretrained, ["a dog"]).texts[0]
    assert decoder.tokens[0] == "<pad>"
    assert len(decoder.tokens) > 1


def test_where_experts_choose_nothing_counts_as_dropped_and_a_token_may_have_any_number(pretrained):
    config = pretrained.config.replace(router_type="experts_choose", capacity_mode="factor", eval_capacity_factor=1.0)
    chooser = dataclasses.replace(pretrained, config=config, model=SwitchTransformer(config))
    encoder, _ = explore(chooser, TEXTS[:1], TARGETS[:1]).texts[0]
    assert encoder.layers[0].dropped() == 0
    assert len({len(experts) for experts in encoder.layers[0].chosen}) > 1


def test_a_plot_is_written(exploration, tmp_path):
    path = plot(exploration, tmp_path / "more" / "routing.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_says_which_choices_were_processed_and_which_dropped(exploration, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **options: drawn.append(figure.axes))
    plot(exploration, tmp_path / "routing.png")
    for axis, (kept, dropped) in zip(drawn[0][-3:], exploration.loads().values(), strict=True):
        assert [entry.get_text() for entry in axis.get_legend().get_texts()] == ["processed", "dropped"]
        for bars, counts in zip(axis.containers, (kept, dropped), strict=True):
            assert [bar.get_height() for bar in bars] == counts.tolist()


def test_a_layer_whose_experts_took_no_token_has_empty_bars_on_the_page(exploration, tmp_path):
    empty = [
        [
            dataclasses.replace(stack, layers=[dataclasses.replace(one, chosen=[[]] * n, kept=[[]] * n) for one in stack.layers])
            for stack in stacks
            for n in [len(stack.tokens)]
        ]
        for stacks in exploration.texts
    ]
    page = write_page(dataclasses.replace(exploration, texts=empty), tmp_path / "routing.html").read_text()
    assert set(re.findall(r"width:([^%]*)%", page)) >= {"0.0"} and "nan" not in page


@pytest.fixture(scope="module")
def explored(exploration, tmp_path_factory):
    return write_page(exploration, tmp_path_factory.mktemp("page") / "routing.html")


def test_the_page_shows_every_token_by_its_expert_with_drops_and_loads(exploration, explored):
    page = explored.read_text()
    chips = re.findall(
        r'<span class="token( dropped)?" data-expert="(\d+)" style="[^"]*">([^<]*)<sub[^>]*>(.*?)</sub></span>', page
    )
    wanted = [
        (" dropped" if not all(kept) else "", str(chosen[0]), html.escape(token), chosen, kept)
        for stacks in exploration.texts for stack in stacks for layer in stack.layers
        for token, chosen, kept in zip(stack.tokens, layer.chosen, layer.kept, strict=True)
    ]  # fmt: skip
    assert [chip[:3] for chip in chips] == [one[:3] for one in wanted]
    for (*_, numbers), (*_, chosen, kept) in zip(chips, wanted, strict=True):
        assert re.findall(r"\d+", numbers) == list(map(str, chosen))
        assert re.findall(r"<s>(\d+)</s>", numbers) == [str(e) for e, flag in zip(chosen, kept, strict=True) if not flag]
    assert "an expert has 4 slots for" in page
    for (stack, layer), (kept, dropped) in exploration.loads().items():
        card = page[page.index(f"<h3>{stack} layer {layer}</h3>") :]
        assert f"<span>{kept[2]}{f' + {dropped[2]} dropped' if dropped[2] else ''}</span>" in card


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_fits_its_window_and_a_legend_picks_an_expert_out(width, dark, explored):
    with Browser() as browser:
        browser.show(explored, width, dark)
        assert browser.value("document.documentElement.scrollWidth") <= width
        browser.value("""document.querySelector('.token[data-expert="2"]')
            .dispatchEvent(new PointerEvent("pointerover", {bubbles: true}))""")
        assert browser.value("""document.querySelector('.token[data-expert="2"]').style.opacity""") == ""
        assert browser.value("""[...document.querySelectorAll('.token:not([data-expert="2"])')].every((e) => e.style.opacity)""")
        assert browser.complaints() == []


def test_experts_have_colours_that_differ_and_text_that_is_read_on_them():
    colors = [expert_color(expert) for expert in range(40)]
    assert len(set(colors)) == 40

    def light(color):
        parts = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return float(np.dot(list(linear), (0.2126, 0.7152, 0.0722)))

    for color in colors:
        a, b = sorted((light(color), light(ink_on(color))))
        assert (b + 0.05) / (a + 0.05) >= 4.5, color


def test_the_command_prints_text_json_and_plots(pretrained, tmp_path, capsys):
    checkpoint = save_pretrained(tmp_path / "model", pretrained.config, pretrained.params, pretrained.vocabulary, "flax_switch")
    command = ["inspect", str(checkpoint), "--text", TEXTS[0], "--target", TARGETS[0]]
    assert main([*command, "--plot", str(tmp_path / "routing.svg")]) == 0
    assert "Text 1, encoder" in capsys.readouterr().out
    assert (tmp_path / "routing.svg").exists()
    assert main([*command, "--plot", str(tmp_path / "routing.html")]) == 0
    assert (tmp_path / "routing.html").read_text().startswith("<!doctype html>")
    assert main([*command, "--open"]) == 2
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["texts"][0][0]["stack"] == "encoder"
    assert main(["inspect", str(checkpoint), "--plot", "x.png"]) == 2
    assert "give a --text" in capsys.readouterr().err


def test_models_without_experts_or_vocabulary_are_errors_that_say_so(pretrained):
    with pytest.raises(ConfigError, match="no vocabulary"):
        explore(dataclasses.replace(pretrained, vocabulary=None), TEXTS)
    dense = pretrained.config.replace(num_sparse_encoder_layers=0, num_sparse_decoder_layers=0)
    with pytest.raises(ConfigError, match="no sparse layer"):
        explore(dataclasses.replace(pretrained, config=dense), TEXTS)
