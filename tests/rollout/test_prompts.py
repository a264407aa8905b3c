"""How long a prompt may be, and what becomes of one that is longer."""

from __future__ import annotations

import pytest

from perl.config import Config, DataConfig, RolloutConfig, TrainConfig
from perl.permutation import permute
from perl.rollout.prompts import PromptEncoder, PromptLimit
from perl.types import Variant
from tests.messages import refused, tells
from tests.stand_ins import Words, example


def variants(id: str, *words: int) -> list[Variant]:
    """Of an example with prompts of so many tokens."""
    return [permute(example(id, 1, question="<image>" + " word" * (n - 1)), (0,)) for n in words]


@pytest.mark.parametrize(
    ("prompt", "budget", "completion", "tokens", "names"),
    [
        (100, 1000, 900, 100, ["data.max_prompt_tokens = 100"]),
        (100, 1000, 899, 100, ["data.max_prompt_tokens = 100"]),
        (
            *(100, 1000, 901, 99),
            ["99", "train.tokens_per_micro_batch = 1000", "rollout.max_new_tokens = 901"],
        ),
    ],
)
def test_prompt_and_completion_fit_a_micro_batch(
    prompt: int, budget: int, completion: int, tokens: int, names: list[str]
) -> None:
    config = Config(
        data=DataConfig(max_prompt_tokens=prompt),
        train=TrainConfig(tokens_per_micro_batch=budget),
        rollout=RolloutConfig(max_new_tokens=completion),
    )
    limit = PromptLimit.to_train(config)
    assert limit.tokens == tokens
    tells(limit.name, *names)
    assert PromptLimit.to_generate(config).tokens == prompt


@pytest.mark.parametrize(("cache", "to_generate", "to_train"), [(1000, 100, 80), (975, 75, 75)])
def test_prompt_and_completion_fit_the_cache(cache: int, to_generate: int, to_train: int) -> None:
    config = Config(
        data=DataConfig(max_prompt_tokens=100),
        train=TrainConfig(tokens_per_micro_batch=980),
        rollout=RolloutConfig(max_new_tokens=900, kv_cache_tokens=cache),
    )
    limits = [PromptLimit.to_generate(config), PromptLimit.to_train(config)]
    assert [limit.tokens for limit in limits] == [to_generate, to_train]
    if cache == 975:
        tells(limits[0].name, 75, "rollout.kv_cache_tokens = 975", "rollout.max_new_tokens = 900")


def test_a_prompt_of_just_so_many_tokens_fits(caplog: pytest.LogCaptureFixture) -> None:
    encoder = PromptEncoder(Words(), PromptLimit(5, "key = 5"), "drop")  # type: ignore[arg-type]
    fits = variants("q1", 5, 4)
    shown = encoder.encode(fits)
    assert [variant for variant, _ in shown] == fits
    assert [len(prompt.input_ids) for _, prompt in shown] == [5, 4]
    # One that is longer takes the example's others with it.
    assert encoder.encode(variants("q2", 4, 6)) == encoder.encode(variants("q3", 6)) == []
    assert encoder.dropped == 2
    (record,) = caplog.records
    tells(record.getMessage(), "q2", "6", "key = 5")
    encoder = PromptEncoder(Words(), PromptLimit(5, "key = 5", "raise it"), "error")  # type: ignore[arg-type]
    assert len(encoder.encode(fits)) == 2
    with refused("q2", "6", "key = 5", "raise it"):
        encoder.encode(variants("q2", 4, 6))
