"""Switch-Large with 128 experts (26.3 B parameters, as much arithmetic a token as T5-Large); data and optimiser of switch_base_8.

Command:   flax-switch pretrain --config configs/switch_large_128.py --workdir runs/switch_large_128 \
               --config.data.source='c4/*.json.gz' --config.data.vocabulary=spiece.model
Hardware:  105 GB of float32 parameters; written for 64 or more accelerators, with --config.mesh.expert=64.
Expect:    2101.03961, table 9: negative log perplexity -1.177 after 500k steps.
"""

from flax_switch.config.presets import PRESETS
from flax_switch.config.recipes import load_recipe, to_config_dict


def get_config():
    return to_config_dict(load_recipe("switch_base_8").replace(model=PRESETS["switch-large-128"]))
