"""Routing groups: flaxformer's tables, and the laws of cutting and pasting."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_switch.config import ConfigError, SwitchConfig
from flax_switch.ops.moe.groups import (
    flaxformer_num_groups,
    flaxformer_padding,
    flaxformer_replicas,
    make_grouping,
    rows_of_whole_groups,
)

TABLES = json.loads((Path(__file__).parents[2] / "goldens" / "tables.json").read_text())


@pytest.mark.parametrize("row", TABLES["num_groups"], ids=str)
def test_flaxformers_number_of_groups_is_reproduced(row):
    args = row["num_tokens"], row["max_group_size"], row["num_experts"], row["replicas"]
    assert flaxformer_num_groups(*args) == row["num_groups"]


@pytest.mark.parametrize("row", TABLES["maybe_pad"], ids=str)
def test_flaxformers_padding_is_reproduced(row):
    assert list(flaxformer_padding(row["batch"], row["seq"], row["num_experts"], row["replicas"])) == row["padded"]


@pytest.mark.parametrize(
    ("devices", "experts", "replicas"),
    [(8, 8, 1), (8, 64, 1), (8, 4, 2), (8, 3, 4), (6, 4, 2), (6, 5, 2), (7, 4, 7), (1, 8, 1), (4, 1, 4)],
)
def test_as_many_devices_as_can_be_share_the_experts_and_the_others_hold_copies(devices, experts, replicas, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert flaxformer_replicas(experts) == replicas


def test_a_batch_that_flaxformer_cannot_group_is_an_error_that_says_what_to_change():
    with pytest.raises(ConfigError, match="routing_group='tokens'"):
        flaxformer_num_groups(10, 4, 4, 1)


@settings(deadline=None, max_examples=30)
@given(
    rule=st.sampled_from(["sequence", "tokens", "flaxformer"]),
    batch=st.integers(1, 6),
    length=st.integers(1, 11),
    group_size=st.integers(1, 40),
    num_experts=st.integers(1, 5),
    replicas=st.integers(1, 2),
)
def test_ungroup_undoes_group_and_every_token_is_counted_once(rule, batch, length, group_size, num_experts, replicas):
    config = SwitchConfig(routing_group=rule, group_size=group_size, num_experts=num_experts)
    grouping = make_grouping(config, batch, length, replicas=replicas)
    x = np.arange(1, batch * length + 1).reshape(batch, length)
    grouped = grouping.group(jnp.asarray(x))
    np.testing.assert_array_equal(grouping.ungroup(grouped), x)
    grouped = np.asarray(grouped)
    assert sorted(grouped[grouped > 0]) == list(range(1, x.size + 1))
    counted = grouping.counted()
    if rule == "flaxformer":  # its filling counts, as zero rows do there
        assert counted is None
    else:
        np.testing.assert_array_equal(grouped > 0, True if counted is None else counted)
    if rule == "tokens":
        assert grouped.shape[1] <= group_size


@pytest.mark.parametrize(("tokens", "group_size", "shape"), [(24, 8, (3, 8)), (24, 100, (1, 24)), (25, 8, (4, 7)), (1, 4, (1, 1))])
def test_token_groups_are_the_fewest_of_equal_size(tokens, group_size, shape):
    grouping = make_grouping(SwitchConfig(routing_group="tokens", group_size=group_size), 1, tokens)
    assert (grouping.num_groups, grouping.group_size) == shape


@pytest.mark.parametrize(
    ("batch", "lengths", "whole"),
    [
        (32, (512, 128), (True, True)),
        (32, (512, 114), (True, True)),
        (32, (512, 130), (True, False)),
        (32, (130, 512), (False, True)),
        (4, (128, 128), (False, False)),
    ],
)
def test_a_batch_is_dealt_out_in_whole_groups_where_they_fit(batch, lengths, whole):
    config, pieces = SwitchConfig(routing_group="tokens", group_size=1024), 2
    block = rows_of_whole_groups(config, batch, pieces, *lengths)
    for length, fits in zip(lengths, whole, strict=True):
        tokens = np.arange(batch * length).reshape(batch, length)
        groups = {tuple(group) for group in make_grouping(config, batch, length).group(jnp.asarray(tokens)).tolist()}
        dealt = tokens.reshape(-1, pieces, block, length).swapaxes(0, 1).reshape(pieces, -1, length)
        grouped = [make_grouping(config, batch // pieces, length).group(jnp.asarray(piece)).tolist() for piece in dealt]
        assert ({tuple(group) for piece in grouped for group in piece} == groups) == fits
