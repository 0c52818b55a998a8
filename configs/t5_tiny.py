"""The dense model of equal FLOPs per token to `tiny`, on the same data with the same optimiser, for comparison.

Command:   flax-switch pretrain --config configs/t5_tiny.py --workdir runs/t5_tiny
Hardware:  2 CPU cores.
Expect:    docs/pretraining.md has both runs side by side.
"""

from flax_switch.config.presets import PRESETS
from flax_switch.config.recipes import load_recipe, to_config_dict


def get_config():
    return to_config_dict(load_recipe("tiny").replace(model=PRESETS["t5-tiny"]))
