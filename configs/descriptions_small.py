"""A small Switch Transformer on the package descriptions of a Debian archive, to be fine-tuned for summarization.

Command:   python scripts/data/debian_descriptions.py data/debian
           flax-switch pretrain --config configs/descriptions_small.py --workdir runs/descriptions
Hardware:  1 or 2 CPU cores.
Expect:    docs/guides/summarization.md says what was measured.
"""

from flax_switch.config import DataConfig, ExperimentConfig, OptimizerConfig, TrainConfig
from flax_switch.presets import PRESETS
from flax_switch.recipes import to_config_dict


def get_config():
    return to_config_dict(
        ExperimentConfig(
            model=PRESETS["switch-tiny"].replace(vocab_size=4096),
            data=DataConfig(
                source="data/debian/corpus/en.txt",
                vocabulary_size=3996,
                inputs_length=96,
                targets_length=32,
                batch_size=32,
                span_corruption_rate=0.5,
                prefix_lm_rate=0.5,
            ),
            optimizer=OptimizerConfig(
                name="adamw",
                schedule="linear",
                learning_rate=3e-3,
                final_learning_rate=1.07e-3,
                warmup_steps=100,
                b2=0.98,
                clip_global_norm=1.0,
            ),
            train=TrainConfig(steps=1000, log_every=25, eval_every=500, eval_batches=20, checkpoint_every=500),
        )
    )
