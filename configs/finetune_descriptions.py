"""Summarizing Debian package descriptions in a line, by a small model that `descriptions_small` pre-trained, on one machine.

Command:   flax-switch finetune --config configs/finetune_descriptions.py --init runs/descriptions --workdir runs/synopses \
               --config.data.train=data/debian/summarization/train.jsonl \
               --config.data.validation=data/debian/summarization/validation.jsonl
Hardware:  1 or 2 CPU cores.
Expect:    ROUGE-L 34 to 35 on held-out pairs after 4 minutes on two cores (6 of CPU time); the first sentence has 26, random
           weights come to 19.
"""

from flax_switch.config.finetuning import (
    EvaluationConfig,
    FinetuneDataConfig,
    FinetuneOptimizerConfig,
    FinetuneRecipe,
    FinetuneTrainConfig,
)
from flax_switch.config.recipes import to_config_dict


def get_config():
    return to_config_dict(
        FinetuneRecipe(
            data=FinetuneDataConfig(
                name="synopses",
                inputs="description",
                targets="synopsis",
                prefix="summarize: ",
                inputs_length=64,
                targets_length=20,
                batch_size=32,
            ),
            optimizer=FinetuneOptimizerConfig(schedule="linear", learning_rate=0.02, warmup_steps=50),
            train=FinetuneTrainConfig(steps=1000, log_every=25, eval_every=1000, eval_batches=20, checkpoint_every=500),
            evaluation=EvaluationConfig(metrics=("rouge",), best="rougeL", max_examples=200, batch_size=50),
        )
    )
