"""What a process finds out about the others before a run begins."""

import os

import pytest

from perl.distributed import warn_if_alone
from tests.messages import tells

# Of `accelerate launch --cpu --num_processes 2` and `1`, of torchrun, of mpirun, and of a shell.
ASKED_FOR_TWO = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "warns"),
    [
        (ASKED_FOR_TWO, True),
        ({"ACCELERATE_USE_CPU": "True"}, False),
        (ASKED_FOR_TWO | {"WORLD_SIZE": "2"}, False),
        (ASKED_FOR_TWO | {"OMPI_COMM_WORLD_SIZE": "2"}, False),
        ({"MASTER_ADDR": "127.0.0.1"}, False),
        ({}, False),
    ],
)
def test_one_process_where_several_were_asked_for(
    variables: dict[str, str],
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in (*ASKED_FOR_TWO, "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setitem(os.environ, name, value)
    warn_if_alone()
    assert len(caplog.records) == warns
    if warns:
        tells(caplog.text, "WARNING", "accelerate", "torchrun --nproc-per-node N")
