"""Whether a run that is hurt at random, again and again, ends with the weights of the run that nobody touched."""
