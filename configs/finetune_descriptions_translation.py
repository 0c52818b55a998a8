"""Translating one-line descriptions of Debian packages from English into Italian, by a small model, on one machine.

Command:   flax-switch finetune --config configs/finetune_descriptions_translation.py --init runs/descriptions-en-it \
               --workdir runs/translation --config.data.train=data/debian/translation/en-it/synopses/train.jsonl \
               --config.data.validation=data/debian/translation/en-it/synopses/validation.jsonl
Hardware:  1 or 2 CPU cores.
Expect:    BLEU 41 to 43 and chrF 69 on held-out synopses (copying the source: 8.5 and 39); docs/guides/translation.md says more.
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
                name="en-it",
                inputs="en",
                targets="it",
                prefix="translate English to Italian: ",
                inputs_length=40,
                targets_length=32,
                batch_size=64,
            ),
            optimizer=FinetuneOptimizerConfig(name="muon", schedule="linear", learning_rate=0.03, warmup_steps=50, b2=0.98),
            train=FinetuneTrainConfig(steps=1600, log_every=50, eval_every=400, eval_batches=20, checkpoint_every=400),
            evaluation=EvaluationConfig(metrics=("bleu", "chrf"), max_examples=400, batch_size=50, num_beams=1),
        )
    )
