"""Whatever a decoder without an encoder is made of: cached decoding says what the whole model says, alone and in company.

The whole model is run without a cache over all tokens so far, and searched by `textbook` in plain Python.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import ALONE, ALONE_BASE, lively_params, sources
from textbook import beam_search, greedy_search

from flax_switch.config import ConfigError
from flax_switch.generation.generate import generate
from flax_switch.nn.transformer import SwitchTransformer

NEW, BEAMS = 6, 3
EARLY_ENDS = (1, *range(20, 24))
QUICK = ("sequential, inputs both ways", "fused, gated, rotary, all three sparse")
CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ALONE]


class Uncached:
    """A model over whole rows, with room for every token; `log_probs` of what may follow the inputs of a row."""

    def __init__(self, config, params, ids, mask, room):
        plain = config.replace(
            ignore_padding_tokens=True, padding_semantics="masked", routing_group="sequence", moe_executor="einsum",
            capacity_mode="factor", eval_capacity_factor=float(config.num_experts), scan_layers=False,
        )  # fmt: skip
        if config.scan_layers:
            from flax_switch.convert.scan import unstack_layers

            params = unstack_layers(params, config)
        model, self.start = SwitchTransformer(plain), config.decoder_start_token_id
        self.inputs = [ids[i][mask[i] == 1].tolist() for i in range(len(ids))]
        self.length = 1 + max(map(len, self.inputs)) + room

        @jax.jit
        def run(tokens, given):
            prefix = given if config.bidirectional_inputs else None
            return model.apply({"params": params}, tokens, prefix_mask=prefix).logits

        self.run = run

    def logits(self, source, continuations):
        """[len(continuations), V]: what follows each of some continuations of a row's inputs."""
        inputs = [self.start, *self.inputs[source]]
        tokens = np.zeros((len(continuations), self.length), np.int32)
        for row, new in enumerate(continuations):
            tokens[row, : len(inputs) + len(new)] = [*inputs, *new]
        given = np.broadcast_to(np.arange(self.length) < len(inputs), tokens.shape)
        said = self.run(tokens, given)
        return np.asarray(said)[np.arange(len(tokens)), [len(inputs) + len(new) - 1 for new in continuations]]

    def log_probs(self, source):
        return lambda continuations: np.asarray(jax.nn.log_softmax(jnp.asarray(self.logits(source, continuations))))


@pytest.fixture(params=CASES, scope="module")
def case(request):
    """A model with parameters, inputs of different lengths and its uncached twin."""
    config = ALONE_BASE.replace(**ALONE[request.param])
    params, (ids, mask) = lively_params(config), sources(config)
    uncached = Uncached(config, params, ids, mask, NEW)
    yield SimpleNamespace(config=config, params=params, ids=ids, mask=mask, uncached=uncached)
    jax.clear_caches()


def run(case, rows=(0, 1, 2, 3), **controls):
    """What `generate` says after some rows' inputs: the new tokens alone."""
    rows = list(rows)
    controls = dict(max_new_tokens=NEW, eos_token_id=EARLY_ENDS, **controls)
    output = generate(SwitchTransformer(case.config), case.params, case.ids[rows], case.mask[rows], **controls)
    start = case.ids.shape[1] + 1
    inputs = output.sequences[:, :start].tolist()
    n = len(inputs) // len(rows)
    for row, found in enumerate(inputs):
        given = [case.config.decoder_start_token_id, *case.uncached.inputs[rows[row // n]]]
        assert found == [case.config.pad_token_id] * (start - len(given)) + given
    return output, [upto_end(row) for row in output.sequences[:, start:].tolist()]


def upto_end(tokens):
    ends = [t for t, token in enumerate(tokens) if token in EARLY_ENDS]
    return tuple(tokens[: ends[0] + 1] if ends else tokens)


def test_greedy_search_says_what_the_whole_model_says(case):
    output, found = run(case, output_scores=True)
    assert output.step_scores[0].std(axis=0).max() > 0.05, "inputs that are continued alike test little"
    for i, tokens in enumerate(found):
        assert tokens == greedy_search(case.uncached.log_probs(i), (), max_new_tokens=NEW, eos=EARLY_ENDS)
        expected = np.concatenate([case.uncached.logits(i, [tokens[:t]]) for t in range(len(tokens))])
        np.testing.assert_allclose(output.step_scores[: len(tokens), i], expected, rtol=1e-4, atol=1e-4)


def test_beams_say_what_the_whole_model_says(case):
    output, found = run(case, num_beams=BEAMS, num_return_sequences=BEAMS)
    for i in range(len(case.ids)):
        book = beam_search(case.uncached.log_probs(i), (), num_beams=BEAMS, max_new_tokens=NEW, eos=EARLY_ENDS)
        assert found[i * BEAMS : (i + 1) * BEAMS] == [tokens for tokens, _ in book]
        scores = output.scores[i * BEAMS : (i + 1) * BEAMS]
        np.testing.assert_allclose(scores, [score for _, score in book], rtol=1e-4, atol=1e-4)


def test_samples_are_drawn_from_what_the_whole_model_says(case):
    output, found = run(case, do_sample=True, top_k=0, num_return_sequences=2, output_scores=True, seed=3)
    for row, tokens in enumerate(found):
        expected = np.concatenate([case.uncached.logits(row // 2, [tokens[:t]]) for t in range(len(tokens))])
        np.testing.assert_allclose(output.step_scores[: len(tokens), row], expected, rtol=1e-4, atol=1e-4)


def test_a_row_says_what_it_says_in_other_company(case):
    together, alone = run(case), run(case, (1, 2, 1, 2))
    assert alone[1][:2] == together[1][1:3]


def test_inputs_may_be_padded_on_any_side_and_begin_with_the_start_token():
    params, (ids, mask) = lively_params(ALONE_BASE), sources(ALONE_BASE)
    model, controls = SwitchTransformer(ALONE_BASE), dict(max_new_tokens=NEW)
    expected = generate(model, params, ids, mask, **controls).sequences
    np.testing.assert_array_equal(generate(model, params, ids[:, ::1], **controls).sequences, expected)
    left = [np.roll(x, 9 - m.sum()) for x, m in zip(ids, mask, strict=True)], np.sort(mask, axis=1)
    np.testing.assert_array_equal(generate(model, params, *map(np.asarray, left), **controls).sequences, expected)
    begun = np.pad(ids, ((0, 0), (1, 0))), np.pad(mask, ((0, 0), (1, 0)), constant_values=1)
    np.testing.assert_array_equal(generate(model, params, *begun, **controls).sequences[:, 1:], expected)


def test_what_a_decoder_alone_continues_is_its_input():
    params = lively_params(ALONE_BASE)
    with pytest.raises(ConfigError, match="continues input_ids"):
        generate(SwitchTransformer(ALONE_BASE), params, [[9, 10]], decoder_input_ids=[[11]])
    for control in (dict(search="t5x", num_beams=2), dict(forced_bos_token_id=5)):
        with pytest.raises(ConfigError, match=f"{next(iter(control))}=.* models with an encoder"):
            generate(SwitchTransformer(ALONE_BASE), params, [[9, 10]], **control)
