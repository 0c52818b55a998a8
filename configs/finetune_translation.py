"""Fine-tuning on translation with T5X's settings, from plain parallel text.

Command:   flax-switch finetune --config configs/finetune_translation.py --init google/switch-base-8 --workdir runs/translation \
               --config.data.train=corpus/train --config.data.validation=corpus/dev
           reads corpus/train.en with corpus/train.de line by line, or names a file of records with fields en and de. For another
           pair set --config.data.targets=fr and --config.data.prefix='translate English to French: '.
Hardware:  for Switch-Base an accelerator of 80 GB, for a small model 2 CPU cores.
           The settings are those that flax-switch recipes finetune_summarization shows.
Expect:    BLEU and chrF by sacreBLEU on the development set every 1000 steps. Released Switch models saw English alone in
           pre-training, so they have the language to learn, too: T5-Base, which was trained on translation, reaches 26.98 BLEU on
           WMT 2014 (1910.10683, table 14).
"""

from flax_switch.config.finetuning import EvaluationConfig, FinetuneDataConfig, FinetuneRecipe, FinetuneTrainConfig
from flax_switch.config.recipes import to_config_dict


def get_config():
    return to_config_dict(
        FinetuneRecipe(
            model=dict(dropout_rate=0.1, expert_dropout_rate=0.4),
            data=FinetuneDataConfig(
                name="translation",
                inputs="en",
                targets="de",
                prefix="translate English to German: ",
                inputs_length=128,
                targets_length=128,
                batch_tokens=65_536,
                packing=True,
                skip_empty=True,
            ),
            train=FinetuneTrainConfig(steps=20_000, eval_every=1000, checkpoint_every=1000),
            evaluation=EvaluationConfig(metrics=("bleu", "chrf"), max_examples=2000),
        )
    )
