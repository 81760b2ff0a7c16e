"""Networks by name: every torchvision classifier, and the CIFAR networks of the papers.

build_model(name, num_classes)    the bare network
expression(name, num_classes)     the same in Python, to be written down
Classifier                        the network as it is trained: its forward passes under autocast
compile_network(network)          torch.compile, as a whole or block by block
model_names()                     every name that build_model knows
"""

from esam_dist.models.build import build_model, expression, model_names
from esam_dist.models.classifier import Classifier
from esam_dist.models.compiled import compile_network

__all__ = ["Classifier", "build_model", "compile_network", "expression", "model_names"]
