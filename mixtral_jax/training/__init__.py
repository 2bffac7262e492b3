"""Loss, optimizer, state, step and the one loop that pretraining and fine-tuning share."""
