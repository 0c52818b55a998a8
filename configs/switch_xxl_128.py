"""Switch-XXL with 128 experts (395 B parameters, as much arithmetic a token as T5-XXL); data and optimiser of switch_base_8.

Command:   flax-switch pretrain --config configs/switch_xxl_128.py --workdir gs://BUCKET/switch_xxl_128 \
               --config.data.source='c4/*.json.gz' --config.data.vocabulary=spiece.model
Hardware:  64 TPU v5p (v5p:4x4x4) or more: 53.0 GiB of each device's 95.7 GiB at the peak. Float32 parameters are 23.0 GiB of
           it. On 32, parameters and gradients alone take 91.9 GiB. Before paying for one:
               flax-switch plan --config configs/switch_xxl_128.py --topology v5p:4x4x4
Expect:    11.1 B of the 394.7 B parameters active per token, 4.4e16 model FLOPs a step of 2**20 source tokens; docs/scaling.md has
           the plan. 2101.03961, table 9: negative log perplexity -1.086 after 250k steps, and a warning: this model was not
           always stable in training.

Parameters, gradients and Adafactor's factored statistics are split over all devices (experts over `expert`, and everything over
`data` by fsdp); scanned layers keep one activation a block and recompute the rest. One piece a batch: micro-batches would hold
the gradients twice. Rows of 128 target tokens, of which 114 are used, so that routing groups lie whole on the devices.
"""

from flax_switch.config import MeshConfig
from flax_switch.config.presets import PRESETS
from flax_switch.config.recipes import load_recipe, to_config_dict


def get_config():
    base = load_recipe("switch_base_8")
    return to_config_dict(
        base.replace(
            model=PRESETS["switch-xxl-128"].replace(scan_layers=True, remat_policy="full"),
            data=base.data.replace(targets_length=128),
            mesh=MeshConfig(expert=16, fsdp=True),
        )
    )
