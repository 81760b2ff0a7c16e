"""Distributed sharpness-aware training of image classifiers: ESAM on PyTorch DDP and DeepSpeed."""

__version__ = "0.1.0"
