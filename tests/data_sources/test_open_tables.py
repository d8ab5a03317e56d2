"""Tables from JSON and Parquet files, as folders, subsets of folders and single files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hamu.data.tables import is_hub_name, open_table, subsets_of
from hamu.errors import DataError

ROWS = [{"a": "one\u2028line", "n": [1, 2]}, {"a": "zwei, größer", "n": []}, {"a": None, "n": [3]}]


def write_json(file: Path, rows: list[Any] = ROWS, *, as_list: bool = False) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = (
        json.dumps(rows, ensure_ascii=False, indent=1) if as_list else "\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    )
    file.write_text(text + "\n\n", encoding="utf-8")
    return file


def write_parquet(file: Path, rows: list[Any] = ROWS) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def read(name: Path | str, split: str = "train", **settings: Any) -> list[Any]:
    return open_table(str(name), split, **settings).read(["a", "n"]).to_pylist()


@pytest.mark.parametrize("form", ["lines.jsonl", "lines.json", "list.json", "rows.parquet"])
def test_a_single_file_gives_the_rows_that_were_written(tmp_path: Path, form: str) -> None:
    file = tmp_path / form
    if file.suffix == ".parquet":
        write_parquet(file)
    else:
        write_json(file, as_list=form.startswith("list"))
    assert read(file) == ROWS
    table = open_table(str(file), "train")
    assert table.schema.names == ["a", "n"]
    assert table.source["kind"] == "file" and table.source["name"] == str(file)
    with pytest.raises(DataError, match="one file and has no split 'test'; it has: train"):
        open_table(str(file), "test")
    with pytest.raises(DataError, match="one file and has no subset 'x'"):
        open_table(str(file), "train", subset="x")


def test_keys_that_a_row_lacks_are_null_and_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"n": 1}\n{"a": "x"}\n', encoding="utf-8-sig")
    assert read(file) == [{"a": None, "n": 1}, {"a": "x", "n": None}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": "x"}\nplain words\n', "line 2 is not a JSON object"),
        ('["x"]', "row 0 is a str, not an object"),
        ('[{"a": "x"', "cannot read"),
        ('{"a": "x"}\n{"a": 3}\n', "column 'a'"),
        ('{"a": "\\ud800"}\n', "column 'a'"),
    ],
)
def test_broken_json_is_refused_on_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=message) as error:
        open_table(str(file), "train")
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_a_subset_is_a_folder_then_a_file_then_a_folder_deeper_inside(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_parquet(folder / "first" / "train.parquet", ROWS[:1])
    write_json(folder / "first.json", ROWS[:2])
    write_json(folder / "second.json", ROWS[:2])
    write_parquet(folder / "deep" / "third" / "kept-00000-of-00001.parquet", ROWS)
    write_parquet(folder / ".cache" / "third" / "kept.parquet", ROWS[:1])
    assert read(folder, subset="first") == ROWS[:1]
    assert read(folder, subset="second") == ROWS[:2]
    assert read(folder, "kept", subset="third") == ROWS
    assert open_table(str(folder), "train", subset="second").source["subset"] == "second"
    assert subsets_of(folder) == (["first", "third"], ["first", "second"])
    with pytest.raises(DataError, match="no subset 'fourth'; its folders are: first, third; its files are: first, second"):
        read(folder, subset="fourth")
    write_parquet(folder / "other" / "third" / "kept.parquet", ROWS)
    with pytest.raises(DataError, match=r"subset 'third' in 2 places \(deep/third, other/third\)"):
        read(folder, "kept", subset="third")


def test_json_files_of_a_folder_are_its_splits(tmp_path: Path) -> None:
    write_json(tmp_path / "set" / "retain.jsonl", ROWS[:1])
    write_json(tmp_path / "set" / "forget.jsonl", ROWS[1:])
    write_json(tmp_path / "set" / "dataset_infos.json", [{"about": "nothing"}])
    assert read(tmp_path / "set", "forget") == ROWS[1:]
    with pytest.raises(DataError, match="no split 'train'; it has: forget, retain"):
        read(tmp_path / "set")


def test_saved_subsets_are_found(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "set" / "in" / "one")
    datasets.DatasetDict({"kept": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "set" / "in" / "two")
    assert read(tmp_path / "set", subset="one") == ROWS
    assert read(tmp_path / "set", "kept", subset="two") == ROWS
    assert subsets_of(tmp_path / "set")[0] == ["one", "two"]


def test_a_missing_file_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "set").mkdir()
    assert is_hub_name("owner/name")
    assert not any(map(is_hub_name, ["rows/mine.jsonl", "./name", "a/b/c", "name", "own/set", "~/name"]))
    with pytest.raises(DataError, match="not an existing folder or .json, .jsonl, .parquet file"):
        open_table("rows/mine.jsonl", "train")
    (tmp_path / "rows.csv").write_text("a,b\n")
    with pytest.raises(DataError, match="is a .csv file; give one of .json, .jsonl, .parquet"):
        open_table("rows.csv", "train")


def test_a_revision_that_is_not_cached_is_never_replaced_by_another(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot load dataset 'owner/name', split 'train', revision 'abc'"):
        open_table("owner/name", "train", revision="abc", cache_dir=str(tmp_path))  # the tests have no network
