"""Flax modules: they hold parameters and call the functions of `flax_switch.ops`."""
