"""A small Switch Transformer on text that this machine has (documentation of Python and its packages): the quickstart.

Six of ten examples are infilling (the whole text comes back, its gaps filled in), the others span corruption (the gaps alone).
Trained so briefly, an encoder-decoder tends to ignore its input. Hence some attention heads begin with weights that find equal
tokens, and the optimiser is Muon: it uses its input within a few hundred steps. The documentation's page on pre-training has more.

Command:   flax-switch pretrain --config configs/tiny.py --workdir runs/tiny
Hardware:  2 CPU cores.
Expect:    4 to 8 minutes (about 400 s of CPU time). In gaps of held-out text 20 % of the tokens are right (always the likeliest:
           4 %) and 19 % of whole gaps. With another text's input the loss rises by 6.9 to 7.1 nats a token in infilling, by 2.8 to
           3.0 in gaps alone and by 5.0 to 5.1 in span corruption, so the model uses its input (three seeds). Of 300 sentences with
           one word masked 286 to 292 come back with every word around the gap, and 45 to 54 as they were, with 4 beams.
"""

from flax_switch.config import DataConfig, ExperimentConfig, OptimizerConfig, TrainConfig
from flax_switch.config.presets import PRESETS
from flax_switch.config.recipes import to_config_dict


def get_config():
    return to_config_dict(
        ExperimentConfig(
            model=PRESETS["switch-tiny"].replace(
                vocab_size=4096,
                num_encoder_layers=3,
                num_decoder_layers=3,
                sparse_layout="middle",  # a place that Hugging Face's config can name
                router_init_std=0.4,
                copying_heads=2,
                capacity_mode="dropless",
                routing_group="tokens",
                group_size=65536,  # all of a batch: its tokens balance the experts together
                load_balancing_loss_coef=0.03,
            ),
            data=DataConfig(
                vocabulary_size=3996,  # most words are one piece; of short ones, the likeliest first one begins many words
                inputs_length=70,
                targets_length=72,
                batch_size=32,
                packing=True,  # documents by themselves, short ones too: what a line on the command line is like
                span_corruption_rate=0.7,
                mode_tokens=True,  # span corruption is asked for by its own token: a line with gaps gets the whole text
                infilling_rate=1.0,
                infilling_words=1.0,  # a gap stands for whole words, as people mean it
                noise_density=0.15,
                mean_noise_span_length=1.0,
            ),
            optimizer=OptimizerConfig(name="muon", schedule="linear", learning_rate=0.05, warmup_steps=100, b2=0.98),
            train=TrainConfig(steps=1250, log_every=20, eval_every=250, eval_batches=40, checkpoint_every=250),
        )
    )
