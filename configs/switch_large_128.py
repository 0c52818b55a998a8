"""Switch-Large with 128 experts (26.3 B parameters, the FLOPs of T5-Large); data and optimiser of switch_base_8.

Command:   flax-switch pretrain --config configs/switch_large_128.py --workdir runs/switch_large_128 \
               --config.data.source='c4/*.json.gz' --config.data.vocabulary=spiece.model
Hardware:  105 GB of float32 parameters; written for 64 or more accelerators, with --config.mesh.expert=64.
Expect:    2101.03961, table 9: negative log perplexity -1.177 after 500k steps.
"""

import pathlib
import runpy

from flax_switch.config.presets import PRESETS

BASE = runpy.run_path(str(pathlib.Path(__file__).with_name("switch_base_8.py")))


def get_config():
    config = BASE["get_config"]()
    config.model.update(PRESETS["switch-large-128"].to_dict())
    return config
