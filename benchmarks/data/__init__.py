"""How fast images become batches, and how well they are shuffled."""
