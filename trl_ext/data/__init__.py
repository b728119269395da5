"""Task generators: verifiable problems as datasets with the columns `prompt` and `answer`."""

from trl_ext.data.calculator import calculator_puzzles

__all__ = ["calculator_puzzles"]
