"""Perplexity and retrieval beyond the training length: RoPE, PI, YaRN, TAPA and stick-breaking.

    python recipes/long_context/run.py [--seeds 0 1 2] [--source my_folder_of_text]

Pretrains small models on the sources of Python's standard library, goes on for a few steps at four
times the length, and measures both at one to eight times the length. README.md says what to expect.
"""

import time
from pathlib import Path

from methods import ModelOptions
from report import report
from rich.console import Console
from study import StudyOptions, set_up_process, study

from trl_ext.parser import StrictParser


def main() -> None:
    options, size = StrictParser([StudyOptions, ModelOptions]).parse_args_and_config()
    console = Console()
    set_up_process()
    started = time.perf_counter()
    rows = study(options, size)
    report(rows, Path(options.folder), console)
    console.print(f"Time: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
