"""What hostile clients of the metrics port cost the training beside it."""
