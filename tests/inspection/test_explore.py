"""The routing explorer shows what the model did, and its command prints and plots it."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from flax_switch.cli import main
from flax_switch.config import ConfigError, SwitchConfig
from flax_switch.data.vocabulary import Vocabulary
from flax_switch.inspection.routing import explore, plot, render
from flax_switch.nn.init import init_params
from flax_switch.nn.transformer import SwitchTransformer
from flax_switch.pretrained import Pretrained, save_pretrained

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
    assert "dropped; highest probability" in text


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


def test_the_command_prints_text_json_and_plots(pretrained, tmp_path, capsys):
    checkpoint = save_pretrained(tmp_path / "model", pretrained.config, pretrained.params, pretrained.vocabulary, "flax_switch")
    command = ["inspect", str(checkpoint), "--text", TEXTS[0], "--target", TARGETS[0]]
    assert main([*command, "--plot", str(tmp_path / "routing.svg")]) == 0
    assert "Text 1, encoder" in capsys.readouterr().out
    assert (tmp_path / "routing.svg").exists()
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
