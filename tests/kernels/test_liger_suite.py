"""The tests of Liger's own source distribution, at their tolerances, run against our losses.

`liger_shim.py` gives our functions Liger's names and says which tests are left out, and why. The
distribution is of the installed version, and downloaded unless PERL_LIGER_SDIST names the unpacked
folder. PERL_LIGER_LARGE=1 adds the shapes that take minutes on a CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path

import pytest

import perl_kernels
from tests.kernels.downloads import release

pytest.importorskip("liger_kernel", reason="needs liger-kernel")
pytest.importorskip("transformers", reason="Liger's test utilities need transformers")

SUITE = "test/chunked_loss/test_grpo_loss.py"
# Of liger-kernel 0.8.5; another version may have more or fewer.
PASSED = {
    "test_correctness": 492,
    "test_correctness_with_bias_correction_kl": 4,
    "test_correctness_with_vllm_is_ratio": 12,
    "test_grpo_frozen_lm_head": 16,
    "test_num_items_in_batch_matches_trl_formula": 3,
    "test_num_items_in_batch_normalizer": 3,
    "test_reduce_grpo_loss_matches_reference": 5,
    "test_reduce_grpo_loss_requires_max_completion_length": 1,
    "test_selective_chunk_forward_matches_reference": 4,
    "test_triton_grpo_loss_matches_reference": 2,
}
Outcomes = dict[str, Counter[str]]


@pytest.fixture(scope="module")
def folder(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("PERL_LIGER_SDIST")
    if given:
        return Path(given)
    cache = getattr(pytestconfig, "cache", None)
    downloads = cache.mkdir("releases") if cache else tmp_path_factory.mktemp("releases")
    source = ("--no-binary", ":all:", "--no-build-isolation")
    archive = release(f"liger-kernel=={version('liger-kernel')}", downloads, *source)
    unpacked = tmp_path_factory.mktemp("liger")
    with tarfile.open(archive) as tar:
        tar.extractall(unpacked, filter="data")
    (root,) = unpacked.iterdir()
    return root


@pytest.fixture(scope="module")
def outcomes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """How often each of Liger's tests came out how. A process of its own: the suite is a package
    named `test`, and the plugin puts our functions into Liger's modules."""
    report = tmp_path_factory.mktemp("report") / "junit.xml"
    paths = [Path(__file__).parent, Path(perl_kernels.__file__).parents[1]]
    options = ["-c", os.devnull, "--rootdir", str(folder), "-p", "liger_shim", "--tb=short", "-q"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", SUITE],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    if done.returncode not in (0, 1):
        pytest.fail(f"Liger's suite did not run:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    result: Outcomes = defaultdict(Counter)
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = [part.tag for part in case if part.tag in ("failure", "error", "skipped")]
        result[case.get("name", "").partition("[")[0]][kinds[0] if kinds else "passed"] += 1
        for part in case:
            if part.tag in ("failure", "error"):
                print(case.get("name"), part.text, sep="\n")
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSED)
def test_of_liger(name: str, outcomes: Outcomes) -> None:
    outcome = outcomes[name]
    assert outcome["failure"] == outcome["error"] == 0
    if os.environ.get("PERL_LIGER_LARGE") != "1" and version("liger-kernel") == "0.8.5":
        assert outcome["passed"] == PASSED[name]


@pytest.mark.slow
def test_no_other_failure(outcomes: Outcomes) -> None:
    assert not {name for name, count in outcomes.items() if count["failure"] + count["error"]}
