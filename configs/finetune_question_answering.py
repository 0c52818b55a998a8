"""Fine-tuning on answering questions about a text, from SQuAD's records, with T5X's settings.

Command:   flax-switch finetune --config configs/finetune_question_answering.py --init google/switch-base-8 --workdir runs/squad \
               --config.data.train=squad/train.parquet --config.data.validation=squad/validation.parquet
           Records have question, context and answers.text, a list: the first answer is learnt, every one counts in evaluation.
Hardware:  for Switch-Base an accelerator of 80 GB, for a small model 2 CPU cores.
           The settings are those that flax-switch recipes finetune_summarization shows.
Expect:    table 5 of 2101.03961 has an average of exact match and F1 on SQuAD of 87.2 for Switch-Base and 85.5 for T5-Base.
"""

from flax_switch.config.finetuning import EvaluationConfig, FinetuneDataConfig, FinetuneRecipe, FinetuneTrainConfig
from flax_switch.config.recipes import to_config_dict


def get_config():
    return to_config_dict(
        FinetuneRecipe(
            model=dict(dropout_rate=0.1, expert_dropout_rate=0.4),
            data=FinetuneDataConfig(
                name="question_answering",
                inputs="question: {question} context: {context}",
                targets="answers.text",
                inputs_length=512,
                targets_length=32,
                batch_tokens=65_536,
                packing=True,
            ),
            train=FinetuneTrainConfig(steps=10_000, eval_every=1000, checkpoint_every=1000),
            evaluation=EvaluationConfig(metrics=("exact_match", "f1"), best="f1", num_beams=1, max_examples=2000),
        )
    )
