"""What `perl-rl doctor` says about the machine."""

from importlib.metadata import PackageNotFoundError

import pytest
import torch

from perl.failures import install_command
from perl.training import doctor
from tests.command_line import run
from tests.messages import tells


def examined(capsys: pytest.CaptureFixture[str]) -> tuple[int | str | None, str]:
    """The exit code, and what was printed."""
    code = run("doctor")
    said = capsys.readouterr()
    return code, said.out + said.err


def line(said: str, name: str) -> str:
    (found,) = [line for line in said.splitlines() if line.startswith(f"{name} ")]
    return " ".join(found.removeprefix(name).split())


def test_what_is_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(*asked: object) -> tuple[str, str]:
        return "sdpa", " ".join(map(str, asked))

    monkeypatch.setattr("perl.model.packed.attention.choose", choose)
    monkeypatch.setattr(
        "perl.model.layers.choose_layers", lambda *asked: (True, False, " ".join(map(str, asked)))
    )
    code, said = examined(capsys)
    assert code == 0
    cuda = torch.cuda.is_available()
    asked = f"auto {'cuda' if cuda else 'cpu'} {cuda and torch.cuda.is_bf16_supported(False)}"
    assert line(said, "attention") == f"sdpa ({asked})"
    assert line(said, "layers") == f"auto auto {'cuda' if cuda else 'cpu'}"
    assert line(said, "math-verify")[0].isdigit() and line(said, "transformers")[0].isdigit()
    tells(line(said, "endpoint"), "none", "PERL_LLM_URL", "PERL_LLM_MODEL")


@pytest.mark.parametrize(
    ("package", "code", "remedy"),
    [
        ("math-verify", 0, install_command("rewards")),
        ("peft", 1, install_command("train")),
    ],
)
def test_what_is_missing(
    package: str,
    code: int,
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    there = doctor.version

    def version(name: str) -> str:
        if name == package:
            raise PackageNotFoundError(name)
        return there(name)

    monkeypatch.setattr(doctor, "version", version)
    found, said = examined(capsys)
    assert found == code
    tells(line(said, package), "missing", remedy)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (
            {"URL": "http://127.0.0.1:9/v1", "MODEL": "judge"},
            ["http://127.0.0.1:9/v1", "judge", "without"],
        ),
        (
            {"URL": "http://host/v1?token=hidden-1", "MODEL": "judge", "API_KEY": "hidden-2"},
            ["http://host/v1", "judge", "with"],
        ),
        (
            {"URL": "http://me:hidden-3@host/v1", "MODEL": "judge"},
            ["cannot", "http://host/v1", "PERL_LLM_API_KEY"],
        ),
        ({"URL": "http://host/v1"}, ["cannot", "PERL_LLM_MODEL"]),
    ],
)
def test_an_endpoint_is_shown_without_its_secrets(
    given: dict[str, str],
    names: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(f"PERL_LLM_{name}", value)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_: pytest.fail("the endpoint was asked"))
    code, said = examined(capsys)
    assert code == 0
    tells(line(said, "endpoint"), *names)
    assert "hidden" not in said
