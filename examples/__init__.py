"""The experiments of the Grokfast paper in Flax, one task a module."""
