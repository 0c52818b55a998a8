"""The dense model of `t5_tiny` as a student of a sparse `tiny` (arXiv:2101.03961, section 4.2).

Command:   flax-switch pretrain --config configs/tiny.py --workdir runs/tiny
           flax-switch distill --config configs/distill_tiny.py --teacher runs/tiny --workdir runs/student
Hardware:  2 CPU cores.
Expect:    docs/distillation.md has the student beside the same model trained alone.
"""

from flax_switch.config.distillation import DistillConfig
from flax_switch.config.recipes import load_recipe, to_config_dict


def get_config():
    alone = load_recipe("t5_tiny")
    return to_config_dict(
        DistillConfig(model=alone.model, data=alone.data, optimizer=alone.optimizer, mesh=alone.mesh, train=alone.train)
    )
