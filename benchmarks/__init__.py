"""What it costs and how it compares: scripts that write measured results."""
