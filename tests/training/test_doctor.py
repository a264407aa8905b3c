"""What `perl-rl doctor` says about the machine."""

from importlib.metadata import PackageNotFoundError

import pytest

from perl.cli import main
from perl.training import doctor


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that names no endpoint."""
    for start in ("PERL_LLM_URL", "PERL_LLM_MODEL", "PERL_LLM_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(start, raising=False)
    return monkeypatch


def examined(capsys: pytest.CaptureFixture[str]) -> tuple[int | str | None, str]:
    """The exit code, and what was printed."""
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    said = capsys.readouterr()
    return stop.value.code, said.out + said.err


def line(said: str, name: str) -> str:
    (found,) = [line for line in said.splitlines() if line.startswith(f"{name} ")]
    return " ".join(found.removeprefix(name).split())


def test_what_is_there(clean: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = examined(capsys)
    assert code == 0
    assert line(said, "math-verify")[0].isdigit() and line(said, "transformers")[0].isdigit()
    assert line(said, "endpoint").startswith("none (PERL_LLM_URL and PERL_LLM_MODEL name one")


@pytest.mark.parametrize(
    ("package", "code", "says"),
    [
        ("math-verify", 0, "missing: pip install '.[rewards]' (in a clone)"),
        ("peft", 1, "missing (needed to train): pip install '.[train]' (in a clone)"),
    ],
)
def test_what_is_missing(
    package: str,
    code: int,
    says: str,
    clean: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    there = doctor.version

    def version(name: str) -> str:
        if name == package:
            raise PackageNotFoundError(name)
        return there(name)

    clean.setattr(doctor, "version", version)
    found, said = examined(capsys)
    assert (found, line(said, package)) == (code, says)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"PERL_LLM_URL": "http://127.0.0.1:9/v1", "PERL_LLM_MODEL": "judge"},
            "http://127.0.0.1:9/v1, judge, without a key (not asked)",
        ),
        (
            {
                "PERL_LLM_URL": "http://host/v1?token=hidden-1",
                "PERL_LLM_MODEL": "judge",
                "PERL_LLM_API_KEY": "hidden-2",
            },
            "http://host/v1, judge, with a key (not asked)",
        ),
        (
            {"PERL_LLM_URL": "http://me:hidden-3@host/v1", "PERL_LLM_MODEL": "judge"},
            "cannot be used: the LLM endpoint http://host/v1 is given with a user name or password",
        ),
        ({"PERL_LLM_URL": "http://host/v1"}, "cannot be used: no model is named for the LLM"),
    ],
)
def test_an_endpoint_is_shown_without_its_secrets(
    given: dict[str, str],
    says: str,
    clean: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in given.items():
        clean.setenv(name, value)
    clean.setattr("urllib.request.urlopen", lambda *_: pytest.fail("the endpoint was asked"))
    code, said = examined(capsys)
    assert code == 0 and line(said, "endpoint").startswith(says)
    assert "hidden" not in said
