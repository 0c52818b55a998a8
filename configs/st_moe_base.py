"""ST-MoE Base (2202.08906): top-2 of 16 gated experts, an extra dense MLP after each sparse layer, router z-loss.

Command:   flax-switch pretrain --config configs/st_moe_base.py --workdir runs/st_moe_base \
               --config.data.source='c4/*.json.gz' --config.data.vocabulary=spiece.model
Hardware:  written for 16 or more accelerators, with --config.mesh.expert=16.
Expect:    steady training: the paper's point is that the router z-loss keeps runs from diverging without costing quality.
"""

from flax_switch.config.presets import PRESETS
from flax_switch.config.recipes import load_recipe, to_config_dict


def get_config():
    return to_config_dict(load_recipe("switch_base_8").replace(model=PRESETS["st-moe-base"]))
