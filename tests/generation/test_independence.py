"""What a row says does not depend on its company, its padding, the cache, or the devices; and what that costs."""

import jax.numpy as jnp
import numpy as np
import pytest

from flax_switch.config import MeshConfig
from flax_switch.config.generation import make_controls, split_numbers
from flax_switch.generation.generate import generate
from flax_switch.generation.program import run_program
from flax_switch.nn.transformer import SwitchTransformer
from flax_switch.ops.kernels.few_rows import unstacked_experts
from flax_switch.parallel.mesh import create_mesh
from flax_switch.pretrained import load_pretrained

CONTROLS = [dict(), pytest.param(dict(num_beams=3), marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def dropless(trained):
    """The trained model as one of ours, which routes without dropping when it generates."""
    return SwitchTransformer(trained.config.replace(capacity_mode="factor", capacity_factor=0.5, eval_capacity_factor=0.5))


def alone(model, params, ids, mask, **controls):
    """Each source by itself, without its padding; outputs filled up with what the batch is filled up with."""
    rows = []
    for row, real in zip(ids, mask, strict=True):
        rows.append(generate(model, params, row[real == 1][None], **controls).sequences[0])
    return rows


def assert_rows_are(sequences, rows):
    for row, expected in zip(sequences, rows, strict=True):
        np.testing.assert_array_equal(row[: len(expected)], expected)
        assert set(row[len(expected) :]) <= {0, 1}, "only filling may follow"


@pytest.mark.quick
@pytest.mark.parametrize("controls", CONTROLS, ids=str)
def test_without_dropping_a_row_is_the_same_alone_in_any_batch_and_with_padding_on_any_side(dropless, trained, sources, controls):
    ids, mask = sources
    controls = dict(max_new_tokens=10, **controls)
    expected = alone(dropless, trained.params, ids[:3], mask[:3], **controls)
    together = generate(dropless, trained.params, ids, mask, **controls).sequences
    assert_rows_are(together[:3], expected)
    lengths = mask.sum(1)
    left = np.stack([np.roll(row, len(row) - n) for row, n in zip(ids, lengths, strict=True)])
    left_mask = np.stack([np.roll(row, len(row) - n) for row, n in zip(mask, lengths, strict=True)])
    assert (left[:, -1] != 0).all()
    np.testing.assert_array_equal(generate(dropless, trained.params, left, left_mask, **controls).sequences, together)
    order = np.array([3, 1, 5, 0])
    np.testing.assert_array_equal(
        generate(dropless, trained.params, ids[order], mask[order], **controls).sequences[:, :6], together[order][:, :6]
    )


@pytest.mark.slow
def test_with_a_capacity_of_its_own_a_sequence_is_the_same_alone_and_in_any_batch(scarce, sources):
    ids, mask = sources
    together = generate(scarce.model, scarce.params, ids, mask, max_new_tokens=10).sequences
    # Padding is routed too, as in Hugging Face; so the source keeps its padding when it is alone.
    rows = [
        generate(scarce.model, scarce.params, ids[i : i + 1], mask[i : i + 1], max_new_tokens=10).sequences[0] for i in range(4)
    ]
    assert_rows_are(together[:4], rows)


def test_another_batch_of_the_same_shape_compiles_nothing(trained, sources):
    ids, mask = sources
    run = lambda ids, **numbers: generate(trained.model, trained.params, ids, mask, do_sample=True, max_new_tokens=5, **numbers)  # noqa: E731
    run(ids, temperature=0.7, seed=1)
    compiled = run_program._cache_size()
    run(ids[::-1].copy(), temperature=1.3, seed=2)
    assert run_program._cache_size() == compiled
    run(ids, temperature=0.7, top_p=0.5)
    assert run_program._cache_size() == compiled + 1, "another control is another program"


def test_beams_do_not_copy_the_sources_keys(trained):
    S, config = 512, trained.config

    def temporaries(num_beams):
        program, numbers = split_numbers(make_controls(dict(max_new_tokens=4, num_beams=num_beams), config))
        inputs = np.ones((1, S), np.int32), np.ones((1, S), bool), np.zeros((1, 1), np.int32), np.zeros((1, 2), np.uint32)
        unstacked = unstacked_experts(trained.params, config.decoder.sparse_layers, config.num_experts)
        variables = {"params": trained.params, "unstacked": unstacked}
        lowered = run_program.lower(config, program, variables, *inputs, numbers)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    keys_and_values = 2 * config.num_decoder_layers * config.num_heads * config.d_kv * S * 4
    assert temporaries(8) - temporaries(2) < keys_and_values, "six more beams must not cost even one copy"


def on_mesh(trained, tmp_path_factory, **axes):
    folder = tmp_path_factory.mktemp("mesh")
    trained.torch.save_pretrained(folder)
    return load_pretrained(folder, mesh=create_mesh(MeshConfig(**axes)))


@pytest.mark.slow
@pytest.mark.parametrize("controls", CONTROLS, ids=str)
@pytest.mark.parametrize(
    "axes", [dict(data=2, expert=2, model=2), dict(data=1, expert=4, model=2), dict(data=4, expert=1, model=2)]
)
def test_a_mesh_says_what_one_device_says(trained, sources, tmp_path_factory, axes, controls):
    loaded = on_mesh(trained, tmp_path_factory, **axes)
    kernel = loaded.params["decoder"]["layers_1"]["mlp"]["expert"]["wi"]["kernel"]
    experts, width = kernel.sharding.shard_shape(kernel.shape)[0], kernel.sharding.shard_shape(kernel.shape)[2]
    assert experts == kernel.shape[0] // axes["expert"], "experts stay where they lie"
    assert width == kernel.shape[2] // axes["model"]
    ids, mask = (np.concatenate([x, x[:2]]) for x in sources)  # eight rows: every mesh splits them
    expected = generate(trained.model, trained.params, ids, mask, max_new_tokens=8, **controls)
    output = generate(loaded.model, loaded.params, ids, mask, max_new_tokens=8, **controls)
    np.testing.assert_array_equal(output.sequences, expected.sequences)
    if controls:
        np.testing.assert_allclose(output.scores, expected.scores, atol=1e-4)


def test_rows_stop_when_all_are_finished(trained, sources):
    third = generate(trained.model, trained.params, *sources, max_new_tokens=3).sequences[:, 3]
    ends = sorted({1, *map(int, third)} - {0})  # with these ends every row's third token is its last, or an earlier one
    output = generate(trained.model, trained.params, *sources, max_new_tokens=40, eos_token_id=ends)
    assert output.sequences.shape[1] <= 4
    assert jnp.asarray(output.sequences[:, -1] != 0).any()
