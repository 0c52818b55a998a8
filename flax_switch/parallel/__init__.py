"""Many devices: the mesh and what is cut over its axes, the pmap mode, and several processes as one run."""
