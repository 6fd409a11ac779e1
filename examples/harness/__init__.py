"""What the experiments share: the training loop, the optimizers, batches, run folders and plots."""
