"""Switch-Base with 8 experts (619 M parameters, as much arithmetic a token as T5-Base), span corruption as in 2101.03961.

Command:   flax-switch pretrain --config configs/switch_base_8.py --workdir runs/switch_base_8 \
               --config.data.source='c4/*.json.gz' --config.data.vocabulary=spiece.model
Hardware:  parameters and Adafactor's state take 2.5 GB in float32; written for 8 or more accelerators of 16 GB or more, with
           --config.mesh.expert=8 to split the experts.
Expect:    batches of 2**20 tokens, as in the paper. Its figure 4 has quality rise with the number of experts at equal FLOPs, from
           T5-Base on; table 1 gives figures for 128 experts (see switch_base_128.py).
"""

from flax_switch.config import DataConfig, ExperimentConfig, TrainConfig
from flax_switch.config.presets import PRESETS
from flax_switch.config.recipes import to_config_dict


def get_config():
    return to_config_dict(
        ExperimentConfig(model=PRESETS["switch-base-8"], data=DataConfig(batch_size=2048), train=TrainConfig(keep_every=50_000))
    )
