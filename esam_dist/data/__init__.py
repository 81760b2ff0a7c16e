"""Data: shards on disk become batches on the device, in an order that survives kills and changes of world size."""

from esam_dist.data.device import Batch
from esam_dist.data.loader import TrainData, ValidationData, open_samples, open_train, open_validation

__all__ = ["Batch", "TrainData", "ValidationData", "open_samples", "open_train", "open_validation"]
