"""A small Switch Transformer on the embedded corpus, for one machine."""

from flax_switch.config import DataConfig, ExperimentConfig, OptimizerConfig, TrainConfig
from flax_switch.presets import PRESETS
from flax_switch.recipes import to_config_dict


def get_config():
    return to_config_dict(
        ExperimentConfig(
            model=PRESETS["switch-tiny"],
            data=DataConfig(vocabulary_size=512, inputs_length=64, targets_length=32, batch_size=32),
            optimizer=OptimizerConfig(
                name="adamw", schedule="linear", learning_rate=5e-3, warmup_steps=100, b2=0.98, clip_global_norm=1.0
            ),
            train=TrainConfig(steps=1000, log_every=20, eval_every=250, eval_batches=40, checkpoint_every=250),
        )
    )
