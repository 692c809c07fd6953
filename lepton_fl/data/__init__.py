"""A site's table: the schema contract, reading, checking, encoding and splitting."""

from lepton_fl.data.cells import Batch
from lepton_fl.data.contract import Contract
from lepton_fl.data.datasets import DATASETS, Dataset, dataset, dealt, load_dataset
from lepton_fl.data.findings import ColumnCheck
from lepton_fl.data.growing import Room
from lepton_fl.data.read import batches, read_csv
from lepton_fl.data.sources import file_source, open_batches
from lepton_fl.data.split import partition, split
from lepton_fl.data.table import CheckReport, Table, check_table, load_table, pool

__all__ = [
    "DATASETS",
    "Batch",
    "CheckReport",
    "ColumnCheck",
    "Contract",
    "Dataset",
    "Room",
    "Table",
    "batches",
    "check_table",
    "dataset",
    "dealt",
    "file_source",
    "load_dataset",
    "load_table",
    "open_batches",
    "partition",
    "pool",
    "read_csv",
    "split",
]
