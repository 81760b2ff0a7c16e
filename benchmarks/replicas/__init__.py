"""What it costs to compare the weights over ranks."""
