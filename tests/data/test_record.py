"""A record as a dataset, in its order or in another."""

import pytest
from datasets import Dataset

from trl_ext.data import load_record, shuffled_in_blocks
from trl_ext.runtime.record import write_round


def test_rounds_and_ranks_come_in_their_order(tmp_path):
    for number, rank in ((10, 0), (2, 1), (2, 0)):
        write_round(str(tmp_path), number, rank, 5 * number, [{"value": 100 * number + rank}])
    record = load_record(tmp_path)
    assert record["value"] == [200, 201, 1000]
    assert record["round"] == [2, 2, 10] and record["rank"] == [0, 1, 0]
    assert record["step"] == [10, 10, 50]


def test_a_folder_without_a_record_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no record.*record_path="):
        load_record(tmp_path)


@pytest.mark.parametrize("block", [1, 3, 10, 100])
def test_rows_stay_within_their_block(block):
    rows = Dataset.from_dict({"i": list(range(10))})
    shuffled = list(shuffled_in_blocks(rows, block, seed=1)["i"])
    assert sorted(shuffled) == list(range(10))
    assert all(position // block == i // block for position, i in enumerate(shuffled))
    assert (shuffled == list(range(10))) == (block == 1)
    assert shuffled == list(shuffled_in_blocks(rows, block, seed=1)["i"])
    assert block == 1 or shuffled != list(shuffled_in_blocks(rows, block, seed=2)["i"])


def test_a_block_of_no_rows_is_refused():
    with pytest.raises(ValueError, match=r"rows_per_block=0.*at least 1"):
        shuffled_in_blocks(Dataset.from_dict({"i": [1]}), 0)
