"""A checkpoint that was cut or changed is found, whichever byte it is; torch itself reads most of them without a word."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from hamu.errors import CheckpointError, CorruptError, DataError
from hamu.training.checkpoints import load_checkpoint, save_checkpoint

STATE = {"weights": torch.arange(50.0), "nested": {"lr": 1.5, "name": "abc"}, "step": 3}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "a" / "checkpoint.pt", STATE)
    return tmp_path / "a" / "checkpoint.pt"


def test_what_was_saved_comes_back(path: Path) -> None:
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["weights"], STATE["weights"])
    assert loaded["nested"] == STATE["nested"]
    assert [each.name for each in path.parent.iterdir()] == ["checkpoint.pt"]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.slow
def test_any_flipped_byte_is_found(path: Path) -> None:
    good = path.read_bytes()
    undetected = []
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        path.write_bytes(bad)
        try:
            load_checkpoint(path)
            undetected.append(place)
        except CorruptError:
            pass
    assert undetected == []


def test_any_cut_is_found(path: Path) -> None:
    good = path.read_bytes()
    for size in range(0, len(good), 5):
        path.write_bytes(good[:size])
        with pytest.raises(CorruptError, match=r"checkpoint\.pt is broken and cannot be read"):
            load_checkpoint(path)


def test_a_broken_checkpoint_is_a_checkpoint_error_and_a_data_error(path: Path) -> None:
    path.write_bytes(b"")
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    with pytest.raises(DataError):
        load_checkpoint(path)


def test_a_missing_checkpoint_is_no_broken_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not there") as caught:
        load_checkpoint(tmp_path / "none.pt")
    assert not isinstance(caught.value, CorruptError)


def test_a_checkpoint_of_torch_alone_is_read_and_its_own_checksums_are_looked_at(path: Path) -> None:
    torch.save(STATE, path)
    assert load_checkpoint(path)["step"] == 3
    bad = bytearray(path.read_bytes())
    at = bad.index(torch.arange(50.0)[1:9].numpy().tobytes())
    bad[at + 2] ^= 1
    path.write_bytes(bad)
    assert torch.load(path, weights_only=True)["step"] == 3  # which is why we look
    with pytest.raises(CorruptError):
        load_checkpoint(path)


def test_a_full_storage_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing fails twice as on a full disk, in torch's own wrapping of the error; then there is space."""
    calls, said = [], []
    real = torch.save

    def failing(state: object, file: object) -> None:
        calls.append(1)
        if len(calls) < 3:
            raise RuntimeError("unexpected pos") from OSError(errno.ENOSPC, "No space left on device")
        real(state, file)

    monkeypatch.setattr(torch, "save", failing)
    monkeypatch.setattr("hamu.storage.files.RETRY_S", 0.01)
    save_checkpoint(tmp_path / "checkpoint.pt", STATE, wait=said.append)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3
    assert len(said) == 2
    assert f"{tmp_path} is full (" in said[0]
    assert "waiting for space" in said[0]
