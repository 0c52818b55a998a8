"""Hugging Face's config.json and SwitchConfig say the same thing, both ways."""

import json

import pytest
import transformers

from flax_switch import PRESETS, ConfigError, SwitchConfig
from flax_switch.config.huggingface import NEVER_DROPS, with_huggingface_semantics
from tests.convert import oracle


@pytest.mark.parametrize("seed", range(30))
def test_a_config_of_theirs_survives_the_way_through_ours(seed):
    theirs = oracle.draw_config(seed)
    config = SwitchConfig.from_huggingface(theirs.to_dict())
    again = transformers.SwitchTransformersConfig(**config.to_huggingface())
    for name, value in theirs.to_dict().items():
        if name not in ("architectures", "dtype", "initializer_factor", "transformers_version", "encoder_sparse_step"):
            if name.startswith("num_sparse_"):
                continue  # another number may build the same layers; the next test compares what is built
            if name != "decoder_sparse_step":
                assert getattr(again, name) == value, name
    assert SwitchConfig.from_huggingface(config.to_huggingface()) == config


@pytest.mark.parametrize("layers", range(1, 13))
def test_sparse_layers_are_those_transformers_builds(layers):
    for sparse in range(layers + 3):
        theirs = oracle.huggingface_config(
            num_layers=layers, num_sparse_encoder_layers=sparse, num_decoder_layers=1, d_model=2, d_kv=1, num_heads=1, d_ff=1,
            num_experts=1, vocab_size=2,
        )  # fmt: skip
        config = SwitchConfig.from_huggingface(theirs.to_dict())
        step = theirs.encoder_sparse_step
        built = [i for i in range(layers) if step > 0 and (i % step == 1 or step == 1)]
        assert list(config.encoder.sparse_layers) == built
        assert config.to_huggingface()["num_sparse_encoder_layers"] == sparse


def test_the_odd_placements_are_built_as_transformers_builds_them():
    theirs = oracle.huggingface_config(num_layers=3, num_sparse_encoder_layers=2, num_decoder_layers=1, num_sparse_decoder_layers=0)
    model = oracle.huggingface_model(theirs)
    built = [[i for i, block in enumerate(stack.block) if block.is_sparse] for stack in (model.encoder, model.decoder)]
    config = SwitchConfig.from_huggingface(theirs.to_dict())
    assert [list(stack.sparse_layers) for stack in config.stacks] == built == [[0, 1, 2], [0]]


def test_a_config_carries_hugging_faces_semantics():
    config = SwitchConfig.from_huggingface({"model_type": "switch_transformers", "expert_capacity": 7})
    assert (config.capacity_mode, config.expert_capacity, config.routing_group) == ("fixed", 7, "sequence")
    assert config.cast_router_probs and not config.zero_padding_activations and not config.ignore_padding_tokens
    assert config.router_loss_reduction == "huggingface" and config.z_loss_coef == config.label_smoothing == 0.0
    assert (config.d_ff, config.num_sparse_encoder_layers, config.router_jitter_noise) == (2048, 3, 0.01)  # their defaults


def test_the_oddities_of_released_files_are_read_as_transformers_reads_them():
    released = dict(
        model_type="switch_transformers", feed_forward_proj="relu", is_gated_act=False, router_type="tokens_masked",
        num_selected_experts=1, is_full_sparse=False, encoder_sparse_step=99, decoder_sparse_step=99, d_ff=3072, num_layers=12,
        num_sparse_encoder_layers=6, num_sparse_decoder_layers=6, torch_dtype="bfloat16", router_ignore_padding_tokens=True,
        num_decoder_layers=None, pad_token_id=0,
    )  # fmt: skip
    config = SwitchConfig.from_huggingface(released)
    assert config.encoder.sparse_layers == (1, 3, 5, 7, 9, 11)
    assert config.decoder_start_token_id == 0 and config.num_decoder_layers == 12
    assert config.mlp_activations == ("relu",) and config.dtype == config.param_dtype == "bfloat16"
    assert not config.ignore_padding_tokens  # the field has no effect in transformers
    c2048 = SwitchConfig.from_huggingface({"num_layers": 15, "num_decoder_layers": 12, "num_sparse_decoder_layers": 15})
    assert c2048.decoder.sparse_layers == ()


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"model_type": "bert"}, "bert"),
        ({"dense_act_fn": "gated-gelu"}, "dense_act_fn"),
        ({"dense_act_fn": "quick_gelu"}, "mlp_activations"),
        ({"eos_token_id": []}, "eos_token_id"),
        ({"eos_token_id": [1, "5"]}, "eos_token_id"),
        ({"eos_token_id": [1, 40_000]}, "extra_eos_token_ids"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings=None"),
    ],
)
def test_what_we_cannot_read_is_named(values, word):
    with pytest.raises(ConfigError, match=word):
        SwitchConfig.from_huggingface({"model_type": "switch_transformers", **values})


@pytest.mark.parametrize("values", [{"tie_word_embeddings": tied} for tied in (True, False, None, 0)] + [{}])
def test_t5_ties_its_head_to_the_embedding_where_transformers_scales_it_as_a_tied_one(values):
    theirs = transformers.T5Config.from_dict(values)
    ours = SwitchConfig.from_huggingface({"model_type": "t5", **values})
    assert ours.tie_word_embeddings is theirs.scale_decoder_outputs
    assert SwitchConfig.from_huggingface(theirs.to_dict()) == ours


@pytest.mark.parametrize("kind", ["T5", "SwitchTransformers"])
@pytest.mark.parametrize(("written", "first", "more"), [(7, 7, ()), ([7], 7, ()), ([7, 1, 7, 5], 7, (1, 5)), (None, 1, ())])
def test_each_of_several_end_of_sequence_ids_is_read_and_written_back(kind, written, first, more):
    theirs = getattr(transformers, f"{kind}Config").from_dict({"eos_token_id": written})
    config = SwitchConfig.from_huggingface(theirs.to_dict())
    assert (config.eos_token_id, config.extra_eos_token_ids) == (first, more)
    assert config.to_huggingface()["eos_token_id"] == ([first, *more] if more else first)


REPRESENTABLE = SwitchConfig(capacity_mode="fixed", zero_padding_activations=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"mlp_activations": ("gelu_new", "linear")},
        {"num_selected_experts": 2},
        {"router_type": "experts_choose"},
        {"batch_prioritized_routing": True},
        {"normalize_router_weights": True},
        {"extra_mlp": True},
        {"shared_expert": True},
        {"expert_d_ff": 16},
        {"relative_attention_per_layer": True},
        {"sparse_layout": "top"},
        {"encoder_sparse_layers": (0, 3)},
        {"capacity_mode": "factor"},
        {"routing_group": "tokens"},
        {"ignore_padding_tokens": True},
        {"zero_padding_activations": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_export_that_hugging_face_cannot_represent_names_the_field(changes):
    assert REPRESENTABLE.to_huggingface()["num_sparse_encoder_layers"] == 6
    with pytest.raises(ConfigError, match=next(iter(changes))):
        REPRESENTABLE.replace(**changes).to_huggingface()


def test_all_problems_are_named_at_once():
    with pytest.raises(ConfigError, match="mlp_activations.*num_selected_experts.*capacity_mode"):
        PRESETS["tokens-choose-base"].to_huggingface()


def test_behaviour_can_be_brought_over_and_what_changed_is_told():
    config, changed = with_huggingface_semantics(PRESETS["switch-base-8"])
    assert changed["capacity_mode"] == ("factor", "fixed") and changed["routing_group"] == ("tokens", "sequence")
    assert config.to_huggingface()["expert_capacity"] == 64
    with pytest.raises(ConfigError, match="mlp_activations"):
        with_huggingface_semantics(PRESETS["switch-xxl-128"])


def test_dropless_is_a_capacity_no_sequence_reaches():
    config = REPRESENTABLE.replace(capacity_mode="dropless", cast_router_probs=True)
    values = config.to_huggingface()
    assert values["expert_capacity"] == NEVER_DROPS
    assert SwitchConfig.from_huggingface(values).capacity_mode == "dropless"


@pytest.mark.parametrize("layout", ["mixed", "huggingface"])
def test_every_preset_hugging_face_can_hold_builds_the_same_sparse_layers_there(layout):
    for name in ("switch-base-8", "switch-base-256", "switch-large-128", "switch-c-2048", "switch-tiny"):
        config, _ = with_huggingface_semantics(PRESETS[name].replace(sparse_layout=layout))
        again = SwitchConfig.from_huggingface(config.to_huggingface())
        assert again.stacks == config.stacks


@pytest.mark.parametrize("projection", ["relu", "gated-gelu", "gated-silu", "gelu_new"])
@pytest.mark.parametrize("tied", [True, False])
def test_dense_t5_configs_survive_the_way_through_ours(projection, tied):
    theirs = transformers.T5Config(feed_forward_proj=projection, tie_word_embeddings=tied, num_layers=3, num_decoder_layers=2)
    config = SwitchConfig.from_huggingface(theirs.to_dict())
    assert not config.is_sparse and config.tie_word_embeddings == tied
    values = config.to_huggingface()
    again = transformers.T5Config(**values)
    for name in (
        "feed_forward_proj",
        "scale_decoder_outputs",
        "num_layers",
        "num_decoder_layers",
        "d_ff",
        "is_gated_act",
        "dense_act_fn",
    ):
        assert getattr(again, name) == getattr(theirs, name), name
    assert SwitchConfig.from_huggingface(json.loads(json.dumps(values))) == config


def test_a_dense_activation_t5_does_not_have_is_named():
    dense = PRESETS["t5-tiny"]
    assert dense.to_huggingface()["model_type"] == "t5"
    with pytest.raises(ConfigError, match="mlp_activations"):
        dense.replace(mlp_activations=("gelu", "linear")).to_huggingface()
