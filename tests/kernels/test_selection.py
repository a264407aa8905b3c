"""The tokens of highest entropy."""

from __future__ import annotations

import pytest
import torch

from perl_kernels import PolicyLoss, policy_loss, top_entropy_weights
from tests.messages import refused


@pytest.mark.parametrize(("fraction", "kept"), [(0.2, 2), (0.25, 3), (1.0, 10), (1e-9, 1)])
def test_the_highest_stay(fraction: float, kept: int) -> None:
    entropy = torch.randperm(10).float()
    weights = top_entropy_weights(entropy, fraction)
    assert weights.tolist() == [1.0 if value >= 10 - kept else 0.0 for value in entropy]


def test_as_trl_does() -> None:
    """Keep what is at or above the quantile, over the tokens that count."""
    entropy, mask = torch.rand(1001), torch.rand(1001) > 0.3
    threshold = torch.quantile(entropy[mask], 1 - 0.2)
    wanted = mask & (entropy >= threshold)
    ours = top_entropy_weights(entropy, 0.2, weights=mask.float()) != 0
    # The quantile lies between two tokens; which of them is taken may differ by rounding.
    assert (ours != wanted).sum() <= 1 and (ours <= mask).all()


def test_weights_are_kept_and_masked_tokens_do_not_count() -> None:
    entropy = torch.tensor([9.0, 1.0, 5.0, float("nan"), 4.0])
    weights = torch.tensor([0.0, 2.0, 0.5, 0.0, 1.0])
    assert top_entropy_weights(entropy, 0.6, weights=weights).tolist() == [0.0, 0.0, 0.5, 0.0, 1.0]
    loss = PolicyLoss.preset("dapo")
    kept = top_entropy_weights(entropy, 0.6, weights=weights)
    bounds = torch.tensor([0, 5], dtype=torch.int32)
    output = policy_loss(-entropy.nan_to_num(), torch.ones(1), bounds, loss, weights=kept)
    assert output.metrics["tokens"] == 2


def test_nan_stays_and_hides_nothing() -> None:
    entropy = torch.tensor([1.0, 2.0, float("nan"), 0.5, 0.1])
    assert top_entropy_weights(entropy, 0.2).tolist() == [0.0, 1.0, 1.0, 0.0, 0.0]


def test_shares_that_are_not_quite_what_they_say() -> None:
    """0.07 * 100 is a little more than 7 in floating point."""
    assert top_entropy_weights(torch.randperm(100).float(), 0.07).sum() == 7


def test_nothing_to_choose_from() -> None:
    assert top_entropy_weights(torch.empty(0), 0.5).shape == (0,)
    assert top_entropy_weights(torch.rand(3), 0.5, weights=torch.zeros(3)).sum() == 0


def test_errors() -> None:
    for fraction in (0.0, 1.5, float("nan")):
        with refused("fraction", fraction, 0, 1, error=ValueError):
            top_entropy_weights(torch.rand(3), fraction)
    with refused("fraction", "str", error=TypeError):
        top_entropy_weights(torch.rand(3), "half")  # type: ignore[arg-type]
    with refused("weights", [2], "[N]", error=ValueError):
        top_entropy_weights(torch.rand(3), 0.5, weights=torch.ones(2))
    with refused("weights", -1.0, error=ValueError):
        top_entropy_weights(torch.rand(1), 0.5, weights=-torch.ones(1))
    for entropy, error, names in (
        (torch.arange(3), TypeError, ("torch.int64",)),
        (torch.rand(3, 1), ValueError, ([3, 1], "[N]")),
    ):
        with refused("entropy", *names, error=error):
            top_entropy_weights(entropy, 0.5)
