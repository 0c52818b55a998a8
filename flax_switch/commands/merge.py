"""flax-switch merge SRC DST --num-experts 8 [--examples FILE --inputs FIELD --targets FIELD]"""

from __future__ import annotations

import argparse

from flax_switch.commands.checkpoints import explain_missing_extras
from flax_switch.commands.experts import add_resize_arguments, add_text_arguments, make_fewer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the model, the destination and the text."""
    add_resize_arguments(parser, "of --keep random")
    add_text_arguments(parser)


@explain_missing_extras
def run(args: argparse.Namespace) -> int:
    """Writes the merged model and prints what it cost."""
    return make_fewer(args, merge=True)
