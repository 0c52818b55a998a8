"""A small Switch Transformer on the package descriptions of a Debian archive, to be fine-tuned for summarization.

Command:   python scripts/data/debian_descriptions.py data/debian
           flax-switch pretrain --config configs/descriptions_small.py --workdir runs/descriptions
Hardware:  1 or 2 CPU cores.
Expect:    about 6 minutes on one core; held out 4.9 nats per token (text alone 5.5, its unigram entropy 6.5).
           docs/guides/summarization.md says what it is good for.
"""

from flax_switch.config import DataConfig, ExperimentConfig, OptimizerConfig, TrainConfig
from flax_switch.config.presets import PRESETS
from flax_switch.config.recipes import to_config_dict


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
                name="adafactor", schedule="linear", learning_rate=0.03, final_learning_rate=0.01, warmup_steps=50
            ),
            train=TrainConfig(steps=600, log_every=25, eval_every=300, eval_batches=20, checkpoint_every=300),
        )
    )
