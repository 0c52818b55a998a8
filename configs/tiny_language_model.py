"""A somewhat smaller model than `tiny`, trained with AdamW, to compare with: it writes like its text but ignores its input.

This was `tiny` before; a run of it in runs/tiny goes on with this recipe. It shows what an unused encoder looks like in a report.

Command:   flax-switch pretrain --config configs/tiny_language_model.py --workdir runs/language_model
Hardware:  2 CPU cores.
Expect:    about 4.5 minutes of training; held-out cross-entropy over text targets 3.47 nats per token, 1.07 below their unigram
           entropy; with another row's inputs the same: encoder_gain within 0.06 of 0.
"""

from flax_switch.config import DataConfig, ExperimentConfig, OptimizerConfig, TrainConfig
from flax_switch.config.presets import PRESETS
from flax_switch.config.recipes import to_config_dict


def get_config():
    return to_config_dict(
        ExperimentConfig(
            model=PRESETS["switch-tiny"],
            data=DataConfig(
                vocabulary_size=256,
                inputs_length=64,
                targets_length=32,
                batch_size=32,
                span_corruption_rate=0.5,
                prefix_lm_rate=0.5,
            ),
            optimizer=OptimizerConfig(
                name="adamw", schedule="linear", learning_rate=3e-3, warmup_steps=100, b2=0.98, clip_global_norm=1.0
            ),
            train=TrainConfig(steps=1200, log_every=20, eval_every=300, eval_batches=40, checkpoint_every=300),
        )
    )
