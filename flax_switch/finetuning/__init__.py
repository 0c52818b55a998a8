"""Fine-tuning: from a checkpoint and a task's files to a model, its scores and its predictions."""
