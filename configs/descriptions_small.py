"""A small Switch Transformer on the package descriptions of a Debian archive, to be fine-tuned for summarization.

Objective, router and optimiser are those of tiny.py, whose comments say why.

Command:   python scripts/data/debian_descriptions.py data/debian
           flax-switch pretrain --config configs/descriptions_small.py --workdir runs/descriptions
Hardware:  1 or 2 CPU cores.
Expect:    about 6 minutes on two cores (12 of CPU time); held out 1.28 nats a token, 80 % of which are right: most are copied.
           docs/guides/summarization.md says what it is good for.
"""

from flax_switch.config import DataConfig, ExperimentConfig, OptimizerConfig, TrainConfig
from flax_switch.config.presets import PRESETS
from flax_switch.config.recipes import to_config_dict


def get_config():
    return to_config_dict(
        ExperimentConfig(
            model=PRESETS["switch-tiny"].replace(
                vocab_size=4096,
                num_encoder_layers=3,
                num_decoder_layers=3,
                sparse_layout="middle",  # a place that Hugging Face's config can name
                router_init_std=0.4,
                copying_heads=2,
                capacity_mode="dropless",
                routing_group="tokens",
                group_size=65536,  # all of a batch
                load_balancing_loss_coef=0.03,
            ),
            data=DataConfig(
                source="data/debian/corpus/en.txt",
                vocabulary_size=3996,
                inputs_length=70,
                targets_length=72,
                batch_size=32,
                packing=True,
                span_corruption_rate=0.7,
                mode_tokens=True,
                infilling_rate=1.0,
                infilling_words=1.0,
                noise_density=0.12,
                mean_noise_span_length=2.0,
            ),
            optimizer=OptimizerConfig(name="muon", schedule="linear", learning_rate=0.05, warmup_steps=100, b2=0.98),
            train=TrainConfig(steps=1000, log_every=25, eval_every=500, eval_batches=20, checkpoint_every=500),
        )
    )
