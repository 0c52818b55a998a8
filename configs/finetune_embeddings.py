"""Fine-tuning an encoder on pairs of texts that belong together, by a contrastive loss with the other rows' texts as negatives.

Command:   flax-switch finetune --config configs/finetune_embeddings.py --init google/switch-base-8 --workdir runs/embeddings \
               --config.data.train=squad/train.parquet --config.data.validation=squad/validation.parquet
           Records have question and context: a question is to find its own context. The decoder is left out.
Hardware:  an accelerator of 80 GB. A batch is not cut into pieces, as its rows are each other's negatives; with less memory lower
           data.batch_size.
           No dropout: all tokens of a text share a mask, as in T5X, so that their mean loses it whole (docs/embeddings.md).
Expect:    recall_at_1, _5 and _10: how often the right context is among the nearest of all contexts of the validation examples.
"""

from flax_switch.config.finetuning import EvaluationConfig, FinetuneDataConfig, FinetuneRecipe, FinetuneTrainConfig
from flax_switch.config.recipes import to_config_dict


def get_config():
    return to_config_dict(
        FinetuneRecipe(
            model=dict(head="embedding", contrastive_temperature=0.05, dropout_rate=0.0, expert_dropout_rate=0.4),
            data=FinetuneDataConfig(
                name="embeddings",
                inputs="question",
                targets="context",
                inputs_length=64,
                targets_length=256,
                batch_size=256,
            ),
            train=FinetuneTrainConfig(steps=2000, eval_every=500, checkpoint_every=500),
            evaluation=EvaluationConfig(metrics=("retrieval",), max_examples=5000),
        )
    )
