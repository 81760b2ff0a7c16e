"""What a step of each method costs, as a multiple of a step of SGD."""
