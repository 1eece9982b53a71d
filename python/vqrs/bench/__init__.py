"""Comparing tables that are trained in their compressed form: data, models, plans of runs, reports.

The data sets and their traits need numpy alone.
"""

from vqrs.bench.datasets import Batch, Dataset, Rows, open_dataset
from vqrs.bench.formats import prepare
from vqrs.bench.prepared import save

__all__ = ["Batch", "Dataset", "Rows", "open_dataset", "prepare", "save"]
