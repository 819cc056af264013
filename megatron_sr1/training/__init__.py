"""What one training step is made of: batches, the trainer, its metrics, sources of rollouts, checkpoints."""
