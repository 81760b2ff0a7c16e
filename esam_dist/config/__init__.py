"""The configuration: the sections of all rooms, strict YAML, `section.key=value` overrides, saved with the run.

load(path, overrides)   a checked `Config`, or `UserError`: one line that names the key, the value and the remedy
parse(values, source)   a checked `Config` from plain values
dump(config)            the resolved configuration as YAML
flat(config)            every value, as `section.key`
keys()                  every default with its description, as `section.key`
"""

from esam_dist.config.explain import add_config_help
from esam_dist.config.read import dump, flat, keys, load, parse
from esam_dist.config.sections import Config

__all__ = ["Config", "add_config_help", "dump", "flat", "keys", "load", "parse"]
