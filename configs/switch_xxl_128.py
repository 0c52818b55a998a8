"""Switch-XXL with 128 experts (395 B parameters, the FLOPs of T5-XXL); data and optimiser of switch_base_8.

Command:   flax-switch pretrain --config configs/switch_xxl_128.py --workdir gs://bucket/switch_xxl_128 \
               --config.data.source='c4/*.json.gz' --config.data.vocabulary=spiece.model
Hardware:  PLACEHOLDER
"""

import pathlib
import runpy

from flax_switch.presets import PRESETS

BASE = runpy.run_path(str(pathlib.Path(__file__).with_name("switch_base_8.py")))


def get_config():
    config = BASE["get_config"]()
    config.model.update(PRESETS["switch-xxl-128"].to_dict())
    config.model.update(scan_layers=True, remat_policy="full")
    config.data.targets_length = 128  # 114 tokens are used: with 128, the groups of both stacks lie whole on the devices
    config.mesh.update(data=-1, expert=16, fsdp=True)
    return config
