"""What is measured: each file gives the `contests(cuda, quick)` of an operation. `test_cases.py` and `compare.py` run them.

To add a case: another `Contest` in a `contests`; to add a file: its name here.
"""

from importlib import import_module

from benchmarks.harness.contest import Contest

# The operations that others do too come first: time may be over before all have run.
NAMES = (
    *("linear_loss", "logprobs", "logits_loss", "attention", "growth", "step", "advantages"),
    *("packing", "permutation", "preprocessing"),
)


def contests_of(name: str, cuda: bool, quick: bool) -> list[Contest]:
    """Raises whatever the file's imports raise, as where it is compared with a revision that has no such module."""
    return import_module(f"benchmarks.cases.{name}").contests(cuda, quick)
