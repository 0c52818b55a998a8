"""A small decoder-only Switch Transformer on text that this machine has: it continues text.

Half of the examples are whole texts (causal language modelling), the others begin with inputs that have no loss and see each other
(prefix language modelling), as a prompt does in generation.

Command:   flax-switch pretrain --config configs/tiny_decoder.py --workdir runs/tiny_decoder
Hardware:  2 CPU cores.
Expect:    165 s of CPU time. Held-out cross-entropy 2.72 nats a token; on text 1.85 better than guessing by how frequent tokens
           are, and 36 % of the tokens right. Greedy continuations soon repeat themselves: 200 steps show that it learns, no more.
"""

from flax_switch.config import DataConfig, ExperimentConfig, OptimizerConfig, TrainConfig
from flax_switch.config.presets import PRESETS
from flax_switch.config.recipes import to_config_dict


def get_config():
    return to_config_dict(
        ExperimentConfig(
            model=PRESETS["switch-tiny"].replace(
                architecture="decoder_only",
                num_decoder_layers=4,
                num_sparse_decoder_layers=2,
                bidirectional_inputs=True,
                router_init_std=0.4,
                capacity_mode="dropless",
                routing_group="tokens",
                group_size=65536,  # all of a batch: its tokens balance the experts together
                load_balancing_loss_coef=0.03,
            ),
            data=DataConfig(
                vocabulary_size=256,
                inputs_length=64,
                targets_length=64,
                batch_size=32,
                span_corruption_rate=0.0,
                prefix_lm_rate=1.0,
                causal_lm_rate=1.0,
            ),
            optimizer=OptimizerConfig(name="muon", schedule="linear", learning_rate=0.05, warmup_steps=100, b2=0.98),
            train=TrainConfig(steps=200, log_every=20, eval_every=50, eval_batches=8, checkpoint_every=50),
        )
    )
