"""`esam-dist compare`: methods, budgets and seeds on one data set and network, at equal time and with statistics.

study        what a study file may say
plan         its runs: which configuration, how many epochs, where
calibrate    what an update of each method costs
runs         the runs as processes: kept, continued, stopped
statistics   means, paired differences, Holm's correction, time to target
page         tables and the HTML page
command      one after the other
"""

from esam_dist.compare.command import add_arguments, run

__all__ = ["add_arguments", "run"]
