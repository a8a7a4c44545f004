"""Cells on a Ray cluster, and the numbers that they share: the same files as one machine makes.

One process leads (driver.py): it holds the output folders, knows what is to be done in which order, writes every
journal, and hands jobs out (dispatch.py). A machine does one job at a time with all its processors, as the command
does at home: memory stays within --max-memory, the same number of threads sums in the same order, and no measured
speed is that of two proofs at once. Several workers on one machine are several Ray nodes on it.

Ray carries jobs and tells of lost machines; it repeats nothing. A job whose worker was lost is given out again by the
driver, and what two attempts could write at the same time is locked (pipeline/workers.py).
"""

from exporter.pipeline.cluster.driver import run_on_ray

__all__ = ["run_on_ray"]
