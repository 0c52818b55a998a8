"""Switch-C: 2048 experts in every layer (1.57 T parameters, 1.75 B of them active per token); data and optimiser of switch_base_8.

Command:   flax-switch pretrain --config configs/switch_c_2048.py --workdir gs://BUCKET/switch_c_2048 \
               --config.data.source='c4/*.json.gz' --config.data.vocabulary=spiece.model
Hardware:  256 TPU v5p (v5p:4x8x8): 47.5 GiB of each device's 95.7 GiB at the peak. On 128, parameters and gradients alone take 95.6
           GiB. On 512 (v5p:8x8x8) give each device as many rows: --config.data.batch_size=4096. Before paying for one:
               flax-switch plan --config configs/switch_c_2048.py --topology v5p:4x8x8
Expect:    6.7e15 model FLOPs a step of 2**20 source tokens, 0.11 s of it at the chips' peak; docs/scaling.md has the plan.
           2101.03961, table 9: negative log perplexity -1.096 after 250k steps, steady throughout.

With 2048 experts and groups of 2048 tokens the least capacity of 2 makes two slots per token, whatever the factor. 30 heads split
over 2 model ways, not over 4. Parameters, gradients and Adafactor's factored statistics are split over all devices; scanned
layers keep one activation a block and recompute the rest. Rows of 128 target tokens, of which 114 are used, so that routing
groups lie whole on the devices.
"""

from flax_switch.config import MeshConfig
from flax_switch.config.presets import PRESETS
from flax_switch.config.recipes import load_recipe, to_config_dict


def get_config():
    base = load_recipe("switch_base_8")
    return to_config_dict(
        base.replace(
            model=PRESETS["switch-c-2048"].replace(scan_layers=True, remat_policy="full"),
            data=base.data.replace(targets_length=128),
            mesh=MeshConfig(expert=128, model=2, fsdp=True),
        )
    )
