"""A look inside: what a checkpoint holds, and where a model sends its tokens."""
