"""Switch-Base with 128 experts (7.4 B parameters, as much arithmetic a token as T5-Base); data and optimiser of switch_base_8.

Command:   flax-switch pretrain --config configs/switch_base_128.py --workdir runs/switch_base_128 \
               --config.data.source='c4/*.json.gz' --config.data.vocabulary=spiece.model
Hardware:  30 GB of float32 parameters; written for 32 or more accelerators, with --config.mesh.expert=32.
Expect:    2101.03961, table 1, capacity factor 1.25: negative log perplexity -1.553 after 100k steps, where T5-Base has -1.731.
"""

from flax_switch.config.presets import PRESETS
from flax_switch.config.recipes import load_recipe, to_config_dict


def get_config():
    return to_config_dict(load_recipe("switch_base_8").replace(model=PRESETS["switch-base-128"]))
