"""Networks by name: every torchvision classifier, and the CIFAR networks of the papers.

build_model(name, num_classes)    the bare network
Classifier                        the network as it is trained: its forward passes under autocast
model_names()                     every name that build_model knows
"""

from esam_dist.models.build import build_model, model_names
from esam_dist.models.classifier import Classifier

__all__ = ["Classifier", "build_model", "model_names"]
