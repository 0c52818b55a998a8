"""What a compiled step costs: its collectives, its memory, its FLOPs, without the hardware it is compiled for."""
