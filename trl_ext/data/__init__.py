"""Task generators and the records of earlier runs, as datasets."""

from trl_ext.data.calculator import calculator_puzzles
from trl_ext.data.calculator_runs import calculator_runs
from trl_ext.data.record import load_record, shuffled_in_blocks

__all__ = ["calculator_puzzles", "calculator_runs", "load_record", "shuffled_in_blocks"]
