"""Fine-tuning on classifying texts, which a text-to-text model does by writing the label; as in GLUE's SST-2.

Command:   flax-switch finetune --config configs/finetune_classification.py --init google/switch-base-8 --workdir runs/sst2 \
               --config.data.train=sst2/train.tsv --config.data.validation=sst2/dev.tsv
           The tables have the columns sentence and label, a number: --config.data.labels="('negative', 'positive')" names them.
Hardware:  for Switch-Base an accelerator of 80 GB, for a small model 2 CPU cores.
           The settings are those that flax-switch recipes finetune_summarization shows.
Expect:    accuracy, the share of labels written exactly. 2101.03961 (table 5) has an average over GLUE's tasks of 86.7 for
           Switch-Base and 84.3 for T5-Base.
"""

from flax_switch.config.finetuning import EvaluationConfig, FinetuneDataConfig, FinetuneRecipe, FinetuneTrainConfig
from flax_switch.config.recipes import to_config_dict


def get_config():
    return to_config_dict(
        FinetuneRecipe(
            model=dict(dropout_rate=0.1, expert_dropout_rate=0.4),
            data=FinetuneDataConfig(
                name="classification",
                inputs="sentence",
                targets="label",
                labels=("negative", "positive"),
                prefix="sst2 sentence: ",
                inputs_length=128,
                targets_length=8,
                batch_size=128,
            ),
            train=FinetuneTrainConfig(steps=5000, eval_every=500, checkpoint_every=500),
            evaluation=EvaluationConfig(metrics=("accuracy",), num_beams=1),
        )
    )
