"""Constrained decoding by a function of the prefix: token for token as transformers, and who is asked what."""

import gc
import weakref

import numpy as np
import pytest
import torch
from architectures import ALONE_BASE, lively_params
from huggingface_pair import EOS, VOCAB, pair
from test_generation_parity import assert_same

from flax_switch.config import ConfigError, MeshConfig
from flax_switch.generation.generate import generate
from flax_switch.generation.program import run_program
from flax_switch.nn.transformer import SwitchTransformer
from flax_switch.parallel.mesh import create_mesh
from flax_switch.pretrained import load_pretrained

NEW = 8
TITLES = [(0, 5, 6, 7, EOS), (0, 5, 9, EOS), (0, 20, 3, 4, 4, EOS), (0, 31, EOS)]


def ordinary(source, tokens):
    """Five tokens that follow from the last one and the source; EOS later on."""
    return [EOS] * (len(tokens) > 3) + [(7 * int(tokens[-1]) + source + 3 * i) % (VOCAB - 3) + 3 for i in range(5)]


def titles(source, tokens):
    """What some titles go on with, as in entity retrieval; after a whole one EOS, since transformers goes on to ask."""
    said = tuple(int(token) for token in tokens)
    return sorted({title[len(said)] for title in TITLES if title[: len(said)] == said and len(title) > len(said)}) or [EOS]


def strictly_titles(source, tokens):
    """The same, without anything to say after what is none."""
    said = tuple(tokens.tolist())
    return {title[len(said)] for title in TITLES if title[: len(said)] == said and len(title) > len(said)}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A T5, with parameters under which outputs differ."""
    import transformers

    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.4 if parameter.dim() > 1 else parameter.data
    return pair(model, tmp_path_factory.mktemp("dense"))


SAMPLES = dict(max_new_tokens=NEW, do_sample=True, num_return_sequences=3, seed=5)
CONTROLS = [
    dict(),
    dict(num_beams=3, num_return_sequences=2),
    pytest.param(dict(min_new_tokens=6), marks=pytest.mark.slow),  # EOS alone is allowed, and not yet possible
    pytest.param(dict(num_beams=4, min_new_tokens=5, num_return_sequences=2), marks=pytest.mark.slow),
    pytest.param(dict(num_beams=3, early_stopping=True, length_penalty=2.0), marks=pytest.mark.slow),
    pytest.param(dict(num_beams=2, repetition_penalty=1.7, forced_bos_token_id=9), marks=pytest.mark.slow),
    pytest.param(dict(num_beams=2, decoder_input_ids=[[0, 5]] * 6), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", ["trained", "dense"])
@pytest.mark.parametrize("controls", CONTROLS, ids=str)
def test_what_a_function_allows_is_found_as_transformers_finds_it(request, sources, name, controls):
    model = request.getfixturevalue(name)
    found = [
        assert_same(model, *sources, prefix_allowed_tokens_fn=function, max_new_tokens=NEW, **controls).sequences
        for function in (ordinary, titles)
    ]
    assert found[0].tolist() != found[1].tolist()


def test_one_program_serves_every_function_and_rows_that_are_over_are_not_asked(trained, sources):
    controls = dict(max_new_tokens=NEW, num_beams=3, num_return_sequences=2)
    expected = generate(trained.model, trained.params, *sources, prefix_allowed_tokens_fn=titles, **controls)
    compiled = run_program._cache_size()
    asked = set()

    def noted(source, tokens):
        asked.add((source, tuple(tokens.tolist())))
        return strictly_titles(source, tokens)  # transformers raises here: it wants something to follow whole titles, too

    found = generate(trained.model, trained.params, *sources, prefix_allowed_tokens_fn=noted, **controls)
    assert run_program._cache_size() == compiled
    np.testing.assert_array_equal(found.sequences, expected.sequences)
    prefixes = {title[:length] for title in TITLES for length in range(1, len(title))}
    assert prefixes <= {tokens for _, tokens in asked} <= prefixes | set(TITLES)
    assert {source for source, tokens in asked if tokens == (0,)} == set(range(6))
    asked.clear()
    said = generate(trained.model, trained.params, *sources, prefix_allowed_tokens_fn=noted, max_new_tokens=NEW).sequences
    assert len({row.index(EOS) for row in said.tolist()}) > 1, "rows end at different steps"
    assert {tokens for _, tokens in asked} <= prefixes


def test_samples_keep_to_what_their_source_may_say(trained, sources):
    sequences = generate(trained.model, trained.params, *sources, prefix_allowed_tokens_fn=ordinary, **SAMPLES).sequences
    for row, tokens in enumerate(sequences.tolist()):
        for place in range(1, tokens.index(EOS) + 1 if EOS in tokens else len(tokens)):
            assert tokens[place] in ordinary(row // 3, tokens[:place])


@pytest.mark.slow
@pytest.mark.parametrize("controls", [dict(), SAMPLES, dict(num_beams=3)], ids=str)
def test_a_function_that_allows_everything_changes_nothing(trained, sources, controls):
    controls = {"max_new_tokens": NEW, **controls}
    expected = generate(trained.model, trained.params, *sources, **controls).sequences
    found = generate(trained.model, trained.params, *sources, prefix_allowed_tokens_fn=lambda *_: range(VOCAB), **controls)
    np.testing.assert_array_equal(found.sequences, expected)


def test_a_source_alone_says_what_it_says_among_others(trained, sources):
    ids, mask = sources
    for controls in (dict(), dict(num_beams=3, num_return_sequences=2)):

        def run(rows, controls=controls):
            given = dict(controls, prefix_allowed_tokens_fn=titles, max_new_tokens=NEW)
            return generate(trained.model, trained.params, ids[rows], mask[rows], **given)

        together, found = run(np.arange(6)), run(np.array([2, 0, 0, 0, 0, 0]))
        n = controls.get("num_return_sequences", 1)
        ours, theirs = found.sequences[:n], together.sequences[2 * n : 3 * n]
        width = min(ours.shape[1], theirs.shape[1])
        np.testing.assert_array_equal(ours[:, :width], theirs[:, :width])


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (
            lambda source, tokens: [] if len(tokens) > 2 and source == 1 else [5],
            ConfigError,
            r"source 1 after .*\[0, 5, 5\].* no token",
        ),
        (lambda source, tokens: [5, VOCAB], ConfigError, f"allows {VOCAB}, which is no id of the vocabulary of {VOCAB}"),
        (lambda source, tokens: [-1], ConfigError, "allows -1, which is no id"),
        (lambda source, tokens: None, ConfigError, "must return a list of ids; it returned None"),
        (lambda source, tokens: ["five"], ConfigError, "must return a list of ids"),
        (lambda source, tokens: 1 // 0, ZeroDivisionError, "division"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(trained, sources, capfd, function, error, message):
    with pytest.raises(error, match=message):
        generate(trained.model, trained.params, *sources, prefix_allowed_tokens_fn=function, max_new_tokens=NEW)
    assert "Traceback" not in capfd.readouterr().err
    expected = generate(trained.model, trained.params, *sources, prefix_allowed_tokens_fn=titles, max_new_tokens=NEW)
    assert expected.sequences.shape[0] == 6, "the next call is none the worse"


def test_t5xs_search_refuses_it_by_name(trained, sources):
    with pytest.raises(ConfigError, match="prefix_allowed_tokens_fn is none of T5X's beam search"):
        generate(trained.model, trained.params, *sources, prefix_allowed_tokens_fn=titles, search="t5x", num_beams=2)


def test_a_decoder_alone_shows_its_inputs_without_padding():
    params, inputs = lively_params(ALONE_BASE), [[9, 10, 11], [12, 0, 0]]
    asked = []

    def even(source, tokens):
        asked.append((source, *tokens.tolist()))
        return range(2, 64, 2)

    output = generate(SwitchTransformer(ALONE_BASE), params, inputs, prefix_allowed_tokens_fn=even, max_new_tokens=3)
    assert (output.sequences[:, 4:] % 2 == 0).all()
    assert asked[:2] == [(0, 0, 9, 10, 11), (1, 0, 12)]
    assert [len(one) for one in asked[2:]] == [6, 4, 7, 5]


@pytest.mark.slow
def test_a_mesh_asks_the_same(dense, sources, tmp_path):
    dense.torch.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path, mesh=create_mesh(MeshConfig(data=4, expert=1, model=2)))
    ids, mask = (np.concatenate([x, x[:2]]) for x in sources)
    for controls in (dict(), dict(num_beams=3)):
        controls = dict(controls, max_new_tokens=NEW, prefix_allowed_tokens_fn=ordinary)
        expected = generate(dense.model, dense.params, ids, mask, **controls)
        np.testing.assert_array_equal(generate(loaded.model, loaded.params, ids, mask, **controls).sequences, expected.sequences)


def test_functions_are_forgotten_after_the_call(trained, sources):
    class Function:
        def __call__(self, source, tokens):
            return [5]

    function = Function()
    generate(trained.model, trained.params, *sources, prefix_allowed_tokens_fn=function, max_new_tokens=NEW)
    gone = weakref.ref(function)
    del function
    gc.collect()
    assert gone() is None
