"""The first hour: a configuration for one's own data (`init`), recipes, networks, shell completion."""

from esam_dist.guide import completion, init, models, recipes, validity

__all__ = ["completion", "init", "models", "recipes", "validity"]
