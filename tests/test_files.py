"""A run's folder and its files: what is put aside and comes back, records cut back, writes that are whole or not there."""

import json
import math
import os
from datetime import date
from io import BytesIO
from pathlib import Path

import pytest

from perl import files
from perl.config import Config
from perl.files import (
    RunFolder,
    append_rows,
    check_safetensors,
    is_main_process,
    keep_rows,
    offline_if_unreachable,
    read_rows,
    replacing,
    resume_command,
    to_line,
    write_json,
)
from perl.recipe import save_config
from tests.messages import refused


def began(folder: RunFolder, mark: str, checkpoint: str | None = "checkpoints/step-1") -> None:
    """A run that wrote its config and a mark, and perhaps a checkpoint."""
    save_config(Config(), folder.config)
    folder.summary.write_text(mark)
    if checkpoint:
        (folder.root / checkpoint).mkdir(parents=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("checkpoint", ["checkpoints/step-1", "seed-3/checkpoints/step-1"])
def test_an_overwritten_run_comes_back_unless_the_new_one_has_begun(
    checkpoint: str, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create(overwrite=False)
    began(folder, "first", checkpoint)
    folder.create(overwrite=True)
    assert names(tmp_path) == [".run.replaced", "run"] and not names(folder.root)
    began(folder, "second", None)  # Stopped before its first checkpoint.
    folder.create(overwrite=True)
    assert names(tmp_path) == [".run.replaced", "run"] and not names(folder.root)
    folder.settle()
    assert names(tmp_path) == ["run"] and folder.summary.read_text() == "first"
    folder.create(overwrite=True)
    began(folder, "third", checkpoint)
    folder.settle()
    assert names(tmp_path) == ["run"] and folder.summary.read_text() == "third"


def test_a_run_without_a_checkpoint_comes_back_too_and_one_that_never_began_leaves_nothing(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path / "runs" / "mine")
    folder.create(overwrite=True)
    began(folder, "first", None)
    folder.create(overwrite=True)
    folder.settle()
    assert folder.summary.read_text() == "first"
    assert folder.is_run() and not folder.has_begun()
    folder.settle()
    assert names(tmp_path / "runs") == []
    folder.create(overwrite=False)
    began(folder, "first of all")
    folder.settle()
    assert names(tmp_path / "runs") == ["mine"] and folder.summary.exists()


def test_the_first_of_several_processes_is_the_main_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    found = [is_main_process()]
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        found.append(is_main_process())
    assert found == [True, True, False]


def test_a_run_goes_on_by_as_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    root, sizes = Path("runs/a"), ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    found = []
    for values in ((), ("4",), ("4", "4"), ("16", "8")):
        for name in sizes:
            monkeypatch.delenv(name, raising=False)
        for name, value in zip(sizes, values, strict=False):
            monkeypatch.setenv(name, value)
        found.append(resume_command(root))
    nodes = "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
    assert found == [
        "perl-rl resume runs/a",
        *["torchrun --nproc-per-node 4 -m perl resume runs/a"] * 2,
        f"torchrun {nodes}--nproc-per-node 8 -m perl resume runs/a",
    ]


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    other = RunFolder(tmp_path / "other")
    other.root.mkdir()
    other.create(overwrite=False)  # It is empty.
    (other.root / "config.toml").write_text("[run]\n[model]\n")
    (tmp_path / "file").write_text("mine")
    with refused(f"run.dir = {other.root}", f"resume {other.root}", "--overwrite", "--run.dir"):
        other.create(overwrite=False)
    with refused(f"run.dir = {other.root}", "--overwrite", "--run.dir"):
        other.create(overwrite=True)
    with refused(f"run.dir = {tmp_path}/file", "--run.dir"):
        RunFolder(tmp_path / "file").create(overwrite=True)
    assert names(other.root) == ["config.toml"] and not RunFolder(tmp_path / "none").is_run()


def test_records_are_cut_back_to_a_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.positions() == {"metrics.jsonl": 0, "rollouts.jsonl": 0}
    folder.append(folder.metrics, {"a": math.nan, "b": [math.inf, 1.5], "c": {"d": -math.inf}})
    line = '{"a": null, "b": [null, 1.5], "c": {"d": null}}\n'
    assert folder.positions() == {"metrics.jsonl": len(line), "rollouts.jsonl": 0}
    at = folder.positions()
    for record in (folder.metrics, folder.rollouts):
        folder.append(record, {"step": 2})
    folder.cut_back(at)
    assert folder.metrics.read_text() == line and folder.rollouts.read_text() == ""
    folder.cut_back({"metrics.jsonl": 999})  # A record that lost its end is not filled up.
    assert folder.metrics.read_text() == line
    folder.cut_back({})
    assert folder.metrics.read_text() == ""


def test_rows_are_written_read_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert list(read_rows(path)) == []
    rows = [{"a": "ä\u2028"}, {"b": b"\x01\x02", "on": date(2025, 1, 2)}, {"half": "\ud800"}]
    append_rows(path, rows[:1])
    append_rows(path, rows[1:])
    assert to_line(rows[0]) == '{"a": "ä\u2028"}\n' and to_line(rows[2]) == '{"half": "\\ud800"}\n'
    read = [rows[0], {"b": "AQI=", "on": "2025-01-02"}, rows[2]]
    with path.open("ab") as file:
        file.write(b"no JSON\n[1]\n" + b'{"cut": 1}')
    assert list(read_rows(path)) == [*read, {}, {}]
    keep_rows(path, 2)
    assert list(read_rows(path)) == read[:2] and path.read_bytes().endswith(b"}\n")


@pytest.mark.parametrize("folder", [False, True])
def test_what_is_replaced_is_the_old_or_the_new_whole(folder: bool, tmp_path: Path) -> None:
    path = tmp_path / "thing"

    def write(place: Path, text: str) -> None:
        (place / "text" if folder else place).write_text(text)

    def text() -> str:
        return (path / "text" if folder else path).read_text()

    left = tmp_path / ".thing.tmp"
    left.mkdir()  # Of a process that was killed.
    with replacing(path, folder=folder) as new:
        write(new, "old")
        assert new == left and not path.exists()
    with pytest.raises(KeyError), replacing(path, folder=folder) as new:
        write(new, "half")
        raise KeyError
    assert text() == "old" and names(tmp_path) == ["thing"]
    with replacing(path, folder=folder) as new:
        write(new, "new")
    assert text() == "new" and names(tmp_path) == ["thing"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_files_of_a_folder_have_the_permissions_of_the_umask(
    umask: int, mode: int, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import save_file

    before = os.umask(umask)
    try:
        with replacing(tmp_path / "model", folder=True) as new:
            save_file({"a": torch.ones(3)}, new / "model.safetensors")
            (new / "more").mkdir()
            (new / "more" / "text").write_text("x")
    finally:
        os.umask(before)
    files = [p for p in (tmp_path / "model").rglob("*") if p.is_file()]
    assert {p.name: p.stat().st_mode & 0o777 for p in files} == {
        "model.safetensors": mode,
        "text": mode,
    }


def test_a_full_disk_under_safetensors_is_an_error_of_the_system(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    with pytest.raises(OSError) as caught, replacing(tmp_path / "x"):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    assert (caught.value.errno, caught.value.filename) == (28, str(tmp_path / "x"))
    for other in (SafetensorError("broken"), ValueError("(os error 28)")):
        with pytest.raises(type(other)), replacing(tmp_path / "x"):
            raise other


def test_numbers_of_a_summary(tmp_path: Path) -> None:
    write_json(tmp_path / "s.json", {"a": (1, math.nan), "b": "x"})
    assert json.loads((tmp_path / "s.json").read_text()) == {"a": [1, None], "b": "x"}


def test_a_broken_table_of_contents_is_named(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    check_safetensors(tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:-4])
    with refused("a.safetensors", error=ValueError):
        check_safetensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("endpoint", "proxies", "reachable", "asked", "offline"),
    [
        ("https://hub.example", {}, False, ("hub.example", 443), True),
        ("https://hub.example", {}, True, ("hub.example", 443), False),
        ("http://hub.example", {}, True, ("hub.example", 80), False),
        ("http://hub.example:8000", {}, True, ("hub.example", 8000), False),
        ("https://hub.example", {"https": "p"}, False, None, False),
        ("https://hub.example", {"all": "p"}, False, None, False),
        ("https://", {}, False, None, False),
    ],
)
def test_the_hub_is_given_up_only_where_it_cannot_be_reached(
    endpoint: str,
    proxies: dict[str, str],
    reachable: bool,
    asked: tuple[str, int] | None,
    offline: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    tries = []

    def connect(address: tuple[str, int], timeout: float) -> BytesIO:
        tries.append((address, timeout))
        if not reachable:
            raise OSError("no route to host")
        return BytesIO()

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(files, "getproxies", lambda: proxies)
    monkeypatch.setattr("socket.create_connection", connect)
    offline_if_unreachable.cache_clear()
    offline_if_unreachable()
    assert tries == ([(asked, 5.0)] if asked else [])
    assert offline == constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # As the user may have said.
    offline_if_unreachable.cache_clear()
    offline_if_unreachable()
    assert len(tries) == bool(asked)
