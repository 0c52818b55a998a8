"""Fine-tuning on summarization with T5X's settings: Adafactor at a constant rate of 1e-3, dropout 0.1 and 0.4 in the experts.

Command:   flax-switch finetune --config configs/finetune_summarization.py --init google/switch-base-8 --workdir runs/summary \
               --config.data.train=train.jsonl --config.data.validation=validation.jsonl
           Lines are {"document": ..., "summary": ...}; other names are set by --config.data.inputs and --config.data.targets.
Hardware:  for Switch-Base an accelerator of 80 GB, for a small model 2 CPU cores.
           Its 619 M parameters with gradients and Adafactor's state take 5 GB in float32; activations of 65,536 tokens
           need an accelerator of 80 GB, or --config.train.microbatches=8 on a smaller one. A model that `configs/tiny.py` trained
           fine-tunes on 2 CPU cores with --config.data.batch_tokens=4096 --config.data.inputs_length=128.
Expect:    table 5 of 2101.03961 has ROUGE-2 on XSum of 20.3 for Switch-Base and 18.7 for T5-Base, after 550k steps of pre-training.
"""

from flax_switch.config.finetuning import EvaluationConfig, FinetuneDataConfig, FinetuneRecipe, FinetuneTrainConfig
from flax_switch.config.recipes import to_config_dict


def get_config():
    return to_config_dict(
        FinetuneRecipe(
            model=dict(dropout_rate=0.1, expert_dropout_rate=0.4),
            data=FinetuneDataConfig(
                name="summarization",
                inputs="document",
                targets="summary",
                prefix="summarize: ",
                inputs_length=512,
                targets_length=128,
                batch_tokens=65_536,
                packing=True,
            ),
            train=FinetuneTrainConfig(steps=10_000, eval_every=1000, checkpoint_every=1000),
            evaluation=EvaluationConfig(metrics=("rouge",), best="rougeL", max_examples=1000),
        )
    )
