"""T5-Base in the same code: the dense model with as much arithmetic a token as every Switch-Base, to compare with.

Command:   flax-switch pretrain --config configs/t5_base.py --workdir runs/t5_base \
               --config.data.source='c4/*.json.gz' --config.data.vocabulary=spiece.model
Hardware:  any accelerator of 16 GB or more; data parallel over as many as there are.
Expect:    2101.03961, table 1: negative log perplexity -1.731 after 100k steps.
"""

from flax_switch.config.presets import PRESETS
from flax_switch.config.recipes import load_recipe, to_config_dict


def get_config():
    return to_config_dict(load_recipe("switch_base_8").replace(model=PRESETS["t5-base"]))
