"""The dense model of `t5_tiny` as a student of a sparse `tiny` (2101.03961, section 4.2).

Command:   flax-switch pretrain --config configs/tiny.py --workdir runs/tiny
           flax-switch distill --config configs/distill_tiny.py --teacher runs/tiny --workdir runs/student
Hardware:  2 CPU cores.
Expect:    docs/distillation.md has the student beside the same model trained alone.
"""

import pathlib
import runpy

from flax_switch.config.distillation import DistillConfig
from flax_switch.config.recipes import to_config_dict

ALONE = runpy.run_path(str(pathlib.Path(__file__).with_name("t5_tiny.py")))


def get_config():
    return to_config_dict(DistillConfig.from_dict(ALONE["get_config"]().to_dict()))
