"""Whole runs, which join data, training, generation and checkpoints: pre-training, fine-tuning, distillation, reports."""
