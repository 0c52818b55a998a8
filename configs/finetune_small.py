"""Fine-tuning a small model, such as `tiny` makes, on a csv or jsonl file of one's own: short texts, small batches.

Command:   flax-switch finetune --config configs/finetune_small.py --init runs/tiny --workdir runs/own \
               --config.data.train=own.csv --config.data.inputs=text --config.data.targets=answer
           names the columns; --config.data.prefix='answer: ' puts a word before every input, which the model remembers.
           Of the examples 5 % are held out, unless --config.data.validation names a file of them.
Hardware:  2 CPU cores.
Expect:    a minute. What can be copied from the input (the place that a sentence names, say) is learnt from 400 examples in 50
           steps; docs/first_hour.md shows it.
"""

from flax_switch.config.finetuning import EvaluationConfig, FinetuneDataConfig, FinetuneRecipe, FinetuneTrainConfig
from flax_switch.config.recipes import to_config_dict


def get_config():
    return to_config_dict(
        FinetuneRecipe(
            data=FinetuneDataConfig(
                name="own",
                inputs="text",
                targets="answer",
                inputs_length=64,
                targets_length=32,
                batch_size=32,
            ),
            train=FinetuneTrainConfig(steps=100, log_every=10, eval_every=50, checkpoint_every=50),
            evaluation=EvaluationConfig(metrics=("exact_match",), best="exact_match", max_examples=200),
        )
    )
