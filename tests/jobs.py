"""Options of `esam-dist launch` as the tests give them."""

import argparse

from esam_dist import launch
from esam_dist.launch import arguments


def parsed(*words):
    """The parsed options `words` with a configuration and one override after them."""
    parser = argparse.ArgumentParser()
    launch.add_arguments(parser)
    return parser.parse_args([*words, "run.yaml", "train.epochs=3"])


def job(*words):
    """The job that the options `words` describe, of two ranks per node unless a hostfile says how many."""
    size = [] if any(word.startswith("--hostfile") for word in words) else ["--nproc-per-node=2"]
    return arguments.job(parsed(*size, *words))
