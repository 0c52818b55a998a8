"""The commands of `flax_switch.cli`: a module each, with `add_arguments(parser)` and `run(args) -> exit status`."""
