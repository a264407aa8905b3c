"""A run whose model is pushed to the hub, which a stand-in takes the place of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

from perl.config import Config, ModelConfig, RunConfig
from perl.recipe import check_config
from perl.training.saving.hub import check_push, model_card
from tests.command_line import ALTERNATING, rewarded, run
from tests.messages import refused, tells


class Hub:
    """huggingface_hub's HfApi, as far as it is asked."""

    def __init__(self, **errors: Exception) -> None:
        self.errors, self.calls = errors, []

    def _called(self, name: str, *given: Any) -> None:
        self.calls.append((name, *given))
        if error := self.errors.get(name):
            raise error

    def whoami(self) -> None:
        self._called("whoami")

    def create_repo(self, repo: str, private: bool, exist_ok: bool) -> str:
        self._called("create_repo", repo, private, exist_ok)
        return f"https://hub/{repo}"

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self._called("upload_folder", repo_id, sorted(p.name for p in folder_path.iterdir()))


def standing_in(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("perl.training.saving.hub.offline_if_unreachable", lambda: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return hub


def test_a_run_pushes_its_model_when_it_ends(
    short_recipe: Path,
    two_tokens: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And one that could not be pushed is whole, and pushed when it is resumed."""
    hub = standing_in(Hub(upload_folder=OSError("no-space")), monkeypatch)
    root = short_recipe.parent / "run"
    train = ("train", short_recipe, *rewarded(root.parent, ALTERNATING))
    assert run(*train, "--run.push-to-hub", "me/mine") == 2
    said = capsys.readouterr()
    tells(said.err, "me/mine", "no-space", f"upload me/mine {root}/models/final")
    tells(said.out, root / "report.html")
    assert (root / "summary.json").exists()
    assert hub.calls[:2] == [("whoami",), ("create_repo", "me/mine", True, True)]
    hub.errors.clear()
    assert run("resume", root) == 0
    tells(capsys.readouterr().out, "https://hub/me/mine")
    assert hub.calls[-1] == ("upload_folder", "me/mine", ["README.md", "letters", "weights"])
    card = (root / "models" / "final" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"


def test_a_card_has_the_model_the_numbers_and_the_recipe() -> None:
    config = Config(
        run=RunConfig(push_to_hub="me/mine"), model=ModelConfig(path="Qwen/Qwen2.5-VL-3B-Instruct")
    )
    summary = {"greedy_before": 0.25, "greedy_after": 0.5, "accuracy_before": None}
    best = {"by": "greedy", "value": 0.75, "step": 9}
    card = model_card(config, {**summary, "best": best, "versions": {"perl-rl": "9.9"}})
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert front["pipeline_tag"] == "image-text-to-text"
    tells(
        card, "# mine", "| greedy | 0.2500 | 0.5000 |", "greedy: 0.7500 at step 9", "9.9", "[train]"
    )
    assert "accuracy |" not in card
    unmeasured = model_card(config, {"best": None, "versions": {"perl-rl": "9.9"}})
    assert "| --- |" not in unmeasured


@pytest.mark.parametrize(
    ("repo", "hub", "names"),
    [
        ("me/mine/no", Hub(), ["run.push_to_hub = me/mine/no"]),
        ("me/mine", Hub(whoami=OSError("no token")), ["me/mine", "no token", "auth login"]),
    ],
)
def test_what_cannot_be_pushed_is_known_before_the_run(
    repo: str, hub: Hub, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    standing_in(hub, monkeypatch)
    with refused(*names):
        check_push(repo)
    check_push("")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with refused("run.push_to_hub", "HF_HUB_OFFLINE", "hf upload"):
        check_push("me/mine")


def test_several_seeds_are_not_one_model() -> None:
    with refused("run.push_to_hub = me/mine", "run.seeds = [0, 1]", "hf upload"):
        check_config(Config(run=RunConfig(push_to_hub="me/mine", seeds=(0, 1))))
