"""What the filters and the experiments cost."""
