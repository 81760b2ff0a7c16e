"""What a run tells the outside: Prometheus, health, JSON lines, TensorBoard, the console."""

from esam_dist.metrics.jsonl import rewind
from esam_dist.metrics.rows import TrainRow, ValidationRow
from esam_dist.metrics.sinks import Metrics

__all__ = ["Metrics", "TrainRow", "ValidationRow", "rewind"]
