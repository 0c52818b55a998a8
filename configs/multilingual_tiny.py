"""A small multilingual Switch Transformer, on package descriptions of a Debian archive in six languages.

As in mT5 (2010.11934) and in section 5.3 of the Switch paper (2101.03961), a language is drawn by the size of its text to the
power of 0.3: English, with 60 times the text of Finnish, comes between three and four times as often.

Command:   python scripts/data/debian_descriptions.py data/debian --languages fr de ru es fi
           flax-switch pretrain --config configs/multilingual_tiny.py --workdir runs/multilingual
Hardware:  1 or 2 CPU cores.
Expect:    5 to 8 minutes (0.2 s a step). Held out, in nats a token: en 4.23, fr 3.98, de 4.03, ru 3.26, es 3.62, fi 3.36.
           benchmarks/multilingual.py has these beside models of one language alone; docs/data.md has the table.
"""

from flax_switch.config import DataConfig, ExperimentConfig, OptimizerConfig, SourceConfig, TrainConfig
from flax_switch.config.presets import PRESETS
from flax_switch.config.recipes import to_config_dict

LANGUAGES = ("en", "fr", "de", "ru", "es", "fi")


def get_config():
    return to_config_dict(
        ExperimentConfig(
            model=PRESETS["switch-tiny"].replace(
                vocab_size=2176, d_model=64, d_ff=256, d_kv=16, sparse_layout="middle", capacity_mode="dropless"
            ),
            data=DataConfig(
                mixture=tuple(SourceConfig(name=name, source=f"data/debian/corpus/{name}.txt") for name in LANGUAGES),
                mixing_temperature=1 / 0.3,
                heldout_fraction=0.05,
                vocabulary_size=2048,
                inputs_length=64,
                targets_length=32,
                batch_size=32,
                span_corruption_rate=0.5,
                prefix_lm_rate=0.5,
            ),
            optimizer=OptimizerConfig(name="muon", schedule="linear", learning_rate=0.05, warmup_steps=50, b2=0.98),
            train=TrainConfig(steps=1800, log_every=50, eval_every=600, eval_batches=120, checkpoint_every=600),
        )
    )
