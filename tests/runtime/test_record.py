"""One file per round and process: whole or not there, the same when a round is sampled again."""

import pyarrow
import pyarrow.parquet
import pytest

from trl_ext.runtime.record import write_round

ROWS = [
    {"prompt": "a", "completion_ids": [[1, 2], [3]], "rewards": [0.5, None], "note": {"x": 1}},
    {"prompt": "b", "completion_ids": [[4], []], "rewards": [1.0, 2.0], "note": {"x": 2}},
]


def test_rows_come_back_as_they_were_written(tmp_path):
    write_round(str(tmp_path / "new"), 3, 1, 12, ROWS)
    (file,) = (tmp_path / "new").iterdir()
    assert file.name == "round-000003-rank-001.parquet"
    where = {"round": 3, "rank": 1, "step": 12}
    assert pyarrow.parquet.read_table(file).to_pylist() == [{**where, **row} for row in ROWS]


def test_a_round_written_again_replaces_itself(tmp_path):
    write_round(str(tmp_path), 0, 0, 0, ROWS)
    write_round(str(tmp_path), 0, 0, 0, ROWS[:1])
    (file,) = tmp_path.iterdir()
    assert pyarrow.parquet.read_table(file).num_rows == 1


def test_a_write_that_breaks_off_leaves_the_file_before(tmp_path, monkeypatch):
    write_round(str(tmp_path), 0, 0, 0, ROWS)

    def full(table, path):
        path.write_bytes(b"PAR1 half a fil")
        raise OSError("no space left on device")

    monkeypatch.setattr(pyarrow.parquet, "write_table", full)
    with pytest.raises(OSError, match="no space"):
        write_round(str(tmp_path), 0, 0, 0, ROWS[:1])
    monkeypatch.undo()
    assert pyarrow.parquet.read_table(tmp_path / "round-000000-rank-000.parquet").num_rows == 2
    assert list(tmp_path.glob("round-*.parquet")) == [tmp_path / "round-000000-rank-000.parquet"]
