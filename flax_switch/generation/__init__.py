"""Generation: greedy search, beams and sampling, on the device. The controls are read without JAX."""
