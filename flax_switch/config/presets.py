"""Published model shapes by name: Switch (2101.03961), ST-MoE (2202.08906) and flaxformer's tokens- and experts-choose."""

from __future__ import annotations

from typing import Any

from flax_switch.config import SwitchConfig, one_of

_SWITCH = SwitchConfig(
    dtype="bfloat16",
    routing_group="tokens",
    group_size=8192,
    router_jitter_noise=0.01,
    expert_dropout_rate=0.4,
)
_LARGE: dict[str, Any] = dict(
    d_model=1024, d_ff=4096, num_heads=16, num_encoder_layers=24, num_decoder_layers=24,
    num_sparse_encoder_layers=12, num_sparse_decoder_layers=12, num_experts=128, group_size=4096,
)  # fmt: skip
_GATED = ("gelu_new", "linear")

# flaxformer's tokens-choose family: top-2, gated, batch-prioritised in the encoder.
_TOKENS_CHOOSE = SwitchConfig(
    dtype="bfloat16", d_ff=2048, mlp_activations=_GATED, num_experts=64, num_selected_experts=2, tie_word_embeddings=False,
    num_sparse_encoder_layers=3, num_sparse_decoder_layers=3, batch_prioritized_routing=True, routing_group="tokens",
    group_size=4096, dropout_rate=0.0,
)  # fmt: skip
_EXPERTS_CHOOSE = _TOKENS_CHOOSE.replace(
    router_type="experts_choose", batch_prioritized_routing=False, capacity_factor=1.0, eval_capacity_factor=1.0,
    num_sparse_encoder_layers=6, num_sparse_decoder_layers=6,
)  # fmt: skip
_ST_MOE = _TOKENS_CHOOSE.replace(
    num_experts=16, batch_prioritized_routing=False, router_z_loss_coef=1e-4, extra_mlp=True,
)  # fmt: skip


def _sizes(
    d_model: int, d_ff: int, num_heads: int, num_layers: int, num_sparse: int, d_kv: int = 64, **more: Any
) -> dict[str, Any]:
    return dict(
        d_model=d_model, d_ff=d_ff, num_heads=num_heads, d_kv=d_kv, num_encoder_layers=num_layers,
        num_decoder_layers=num_layers, num_sparse_encoder_layers=num_sparse, num_sparse_decoder_layers=num_sparse, **more,
    )  # fmt: skip


_FAMILY = {
    "tiny": _sizes(32, 64, 6, 2, 1, num_experts=8),
    "small": _sizes(512, 1024, 6, 8, 2, num_experts=32),
    "base": {},
    "large": _sizes(1024, 2816, 16, 24, 6),
    "xl": _sizes(2048, 5120, 32, 24, 6),
    "xxl": _sizes(4096, 10240, 64, 24, 6),
}
_EXPERTS_CHOOSE_SPARSE = {"tiny": 1, "small": 4, "base": 6, "large": 12, "xl": 12, "xxl": 12}

# For one machine, vocabulary included. At this size and length of training a tenth of the usual initialisation only costs steps,
# short sequences need room to route unevenly, and padding (a third of the positions) would crowd an expert.
_TINY = SwitchConfig(
    vocab_size=384, init_scale=1.0, capacity_factor=2.0, ignore_padding_tokens=True, dropout_rate=0.0,
    **_sizes(128, 512, 4, 2, 1, d_kv=32),
)  # fmt: skip


class _Presets(dict[str, SwitchConfig]):
    """A dict in which a name that is none is an error with the nearest one."""

    def __missing__(self, name: str) -> SwitchConfig:
        one_of("A preset's name", name, tuple(self))
        raise AssertionError  # `one_of` has raised

    def __repr__(self) -> str:
        return f"presets: {', '.join(self)}"


PRESETS: dict[str, SwitchConfig] = _Presets({
    # One machine: what `configs/tiny_language_model.py` trains; `configs/tiny.py` has a layer more in each stack.
    "switch-tiny": _TINY,
    **{f"switch-base-{e}": _SWITCH.replace(num_experts=e) for e in (8, 16, 32, 64, 128, 256)},
    "switch-large-128": _SWITCH.replace(**_LARGE),
    "switch-xxl-128": _SWITCH.replace(
        **_sizes(4096, 10240, 64, 24, 12), num_experts=128, group_size=4096, eval_capacity_factor=4.0, min_expert_capacity=2,
        mlp_activations=_GATED, tie_word_embeddings=False,
    ),
    "switch-c-2048": _SWITCH.replace(
        **_sizes(2080, 6144, 30, 15, 15), num_experts=2048, group_size=2048, capacity_factor=1.0, min_expert_capacity=2,
        tie_word_embeddings=False,
    ),
    **{f"tokens-choose-{size}": _TOKENS_CHOOSE.replace(**changes) for size, changes in _FAMILY.items()},
    **{
        f"experts-choose-{size}": _EXPERTS_CHOOSE.replace(
            **{**changes, "num_sparse_encoder_layers": sparse, "num_sparse_decoder_layers": sparse}
        )
        for (size, changes), sparse in zip(_FAMILY.items(), _EXPERTS_CHOOSE_SPARSE.values(), strict=True)
    },
    "st-moe-base": _ST_MOE,
    "st-moe-xl": _ST_MOE.replace(
        **_sizes(2048, 5120, 32, 24, 6), capacity_factor=2.0, eval_capacity_factor=4.0, group_size=1024,
    ),
    "st-moe-32b": _ST_MOE.replace(
        **_sizes(5120, 20480, 64, 24, 6, d_kv=128), num_experts=64, router_z_loss_coef=1e-3,
    ),
    # Dense baselines: Switch with one expert per token costs the same FLOPs.
    "t5-base": _SWITCH.replace(num_sparse_encoder_layers=0, num_sparse_decoder_layers=0, expert_dropout_rate=None),
    "t5-tiny": _TINY.replace(num_sparse_encoder_layers=0, num_sparse_decoder_layers=0),
})  # fmt: skip
