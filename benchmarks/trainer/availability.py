"""Whether there is a TRL to compare with."""

from __future__ import annotations

OLDEST = (1, 16)
_USED = (
    "_calculate_rewards",
    "_generate_and_score_completions",
    "_generate_single_turn",
    "_prepare_inputs",
    "compute_loss",
)


def why_not() -> str:
    """One line that says why TRL's GRPO trainer cannot be used here; empty if it can."""
    try:
        import trl
        from trl import GRPOTrainer
    except Exception as error:  # A package that TRL needs may fail in any way.
        while error.__cause__ is not None:
            error = error.__cause__
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return f"TRL's GRPOTrainer cannot be imported ({reason}); pip install 'trl>=1.16'"
    numbers = trl.__version__.split(".")[:2]
    if not all(n.isdecimal() for n in numbers) or tuple(map(int, numbers)) < OLDEST:
        return (
            f"TRL {trl.__version__} is installed, 1.16 or newer is needed; pip install 'trl>=1.16'"
        )
    lacking = [name for name in _USED if not hasattr(GRPOTrainer, name)]
    if lacking:
        return (
            f"the GRPOTrainer of TRL {trl.__version__} has no {lacking[0]}; pip install trl==1.16.0"
        )
    return ""
