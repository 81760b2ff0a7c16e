"""What was trained, for others to use: `esam-dist export` and `esam-dist predict`.

card       what must be known of weights to use them: classes, pixels, provenance; kept in every checkpoint
trained    the weights of a run, of a checkpoint, or of an exported file
formats    the files that are written, each read back and compared
images     image files as validation sees its samples
rows       predictions as CSV or JSON lines
"""

from esam_dist.ship import export, predict
from esam_dist.ship.card import describe

__all__ = ["describe", "export", "predict"]
