"""What it costs, and what it changes, to choose samples among all ranks: a simulation."""
