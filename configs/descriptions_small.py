"""A small Switch Transformer on the package descriptions of a Debian archive, to be fine-tuned for summarization.

All but the text, and that gaps are fewer and longer, is as in tiny.py, whose comments say why.

Command:   python scripts/data/debian_descriptions.py data/debian
           flax-switch pretrain --config configs/descriptions_small.py --workdir runs/descriptions
Hardware:  1 or 2 CPU cores.
Expect:    about 6 minutes on two cores (12 of CPU time); held out 1.08 nats a token, 83 % of which are right: most are copied.
           docs/guides/summarization.md says what it is good for.
"""

from flax_switch.config.recipes import load_recipe, to_config_dict


def get_config():
    base = load_recipe("tiny")
    return to_config_dict(
        base.replace(
            data=base.data.replace(source="data/debian/corpus/en.txt", noise_density=0.1, mean_noise_span_length=2.0),
            train=base.train.replace(log_every=25, eval_every=500, eval_batches=20, checkpoint_every=500),
        )
    )
