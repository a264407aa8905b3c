"""The machine code of every kernel that the public functions launch: instructions per element, widths
of loads and stores, registers, spills, occupancy. Needs Triton and no GPU.

    python -m benchmarks.machine_code [--write docs/kernels.md | --json]

The functions are called with tensors on the CPU while Triton takes the machine for a GPU of compute
capability 8.0, 9.0 or 10.0: it binds and specialises the arguments and compiles as it would there, and
launches nothing. So what is read is what runs, and results are not.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

if __name__ == "__main__":
    # Read when Triton is imported: kernels are defined for its interpreter or to be compiled.
    os.environ.pop("TRITON_INTERPRET", None)

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import perl_kernels
from perl_kernels import GroupedRewards, PolicyLoss, dispatch

ARCHITECTURES = (80, 90, 100)
HEADING = "## Resources"
# Qwen's padded vocabulary, its tokens, and one whose rows start at every place of a 16-byte unit.
COLUMNS = (151936, 151665, 32001)

_REGISTERS, _WARPS, _BLOCKS = 65536, 64, 32
# Of one multiprocessor, in bytes; the driver takes 1 KB of it for each block.
_SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
_RESERVED = 1024


class Launch(NamedTuple):
    """`elements`: columns of a row that a thread takes at once, 0 in other kernels. `new`: whether it
    had to be compiled."""

    kernel: str
    elements: int
    compiled: Any
    new: bool


@contextmanager
def pretended(architecture: int) -> Iterator[list[Launch]]:
    """CPU tensors go to Triton, which compiles for `architecture`; what it would launch is noted."""
    launches: list[Launch] = []
    launched = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        known = len(self.device_caches[architecture][0])
        compiled = launched(self, *args, grid=grid, warmup=True, **options)
        new = len(self.device_caches[architecture][0]) > known
        tiling = [x for x in args if hasattr(x, "vector")]
        elements = tiling[0].vector * tiling[0].repeats if tiling else 0
        launches.append(Launch(self.__name__, elements, compiled, new))
        return compiled

    target = GPUTarget("cuda", architecture, 32)
    fake = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: architecture,
        get_current_stream=lambda device: 0,
    )
    with (
        mock.patch.object(driver, "_active", fake),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(dispatch, "_refuses", lambda backend, device, dtype: None),
    ):
        yield launches


class Case(NamedTuple):
    """A call of public functions on logits of `columns` columns."""

    name: str
    call: Callable[[int], object]
    columns: tuple[int, ...] = COLUMNS


PLAIN = PolicyLoss()
EVERYTHING = PolicyLoss(
    surrogate="dppo_kl",
    kl="k3",
    kl_coef=0.1,
    kl_bias_correction=True,
    entropy_coef=0.1,
    correction="token_mask",
)
_N, _H, _B = 4, 16, 2
_TRITON: dict[str, Any] = {"backend": "triton"}


def _logits(columns: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(_N, columns, dtype=dtype, requires_grad=True)


def _head(columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return tuple(torch.zeros(n, _H, dtype=dtype, requires_grad=True) for n in (_N, columns))  # type: ignore[return-value]


def _scores(columns: int, dtype: torch.dtype) -> dict[str, Any]:
    bias = torch.zeros(columns, dtype=dtype, requires_grad=True)
    return {"bias": bias, "softcap": 30.0, "temperature": torch.ones(_N), **_TRITON}


def _targets() -> Tensor:
    return torch.zeros(_N, dtype=torch.int64)


def _loss(loss: PolicyLoss, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Positional and other arguments of a loss, after the log-probs."""
    near = torch.zeros(_N, dtype=dtype)
    others: dict[str, Any] = {"old_logprobs": near, **_TRITON}
    if loss.correction is not None:
        others |= {"ref_logprobs": near, "rollout_logprobs": near, "weights": torch.ones(_N)}
    advantages: Any = torch.zeros(_B)
    if loss.correction is not None:
        advantages = GroupedRewards(torch.zeros(_B), torch.tensor([_B]))
    return (advantages, torch.tensor([0, 1, _N], dtype=torch.int32), loss), others


def _token_logprobs(dtype: torch.dtype) -> Callable[[int], None]:
    def call(columns: int) -> None:
        perl_kernels.token_logprobs(
            _logits(columns, dtype), _targets(), **_TRITON
        ).logprobs.sum().backward()

    return call


def _linear_token_logprobs(dtype: torch.dtype) -> Callable[[int], None]:
    def call(columns: int) -> None:
        hidden, weight = _head(columns, dtype)
        found = perl_kernels.linear_token_logprobs(
            hidden, weight, _targets(), **_scores(columns, dtype)
        )
        (found.logprobs.sum() + found.entropy.sum()).backward()

    return call


def _grpo_loss(columns: int) -> None:
    positional, others = _loss(PLAIN)
    logits = _logits(columns, torch.bfloat16)
    perl_kernels.grpo_loss(
        logits.clone(), _targets(), *positional, inplace=True, **others
    ).loss.backward()


def _linear_grpo_loss(
    dtype: torch.dtype, loss: PolicyLoss = PLAIN, **options: Any
) -> Callable[[int], None]:
    def call(columns: int) -> None:
        positional, others = _loss(loss)
        if loss is EVERYTHING:
            others |= _scores(columns, dtype)
        perl_kernels.linear_grpo_loss(
            *_head(columns, dtype), _targets(), *positional, **others, **options
        ).loss.backward()

    return call


def _policy_loss(loss: PolicyLoss, dtype: torch.dtype) -> Callable[[int], None]:
    def call(columns: int) -> None:
        positional, others = _loss(loss, dtype)
        logprobs, entropy = torch.zeros(2, _N, dtype=dtype, requires_grad=True)
        perl_kernels.policy_loss(logprobs, *positional, entropy=entropy, **others).loss.backward()

    return call


def _group_advantages(columns: int) -> None:
    perl_kernels.group_advantages(torch.zeros(_N), [2, 2], **_TRITON)
    weighted: dict[str, Any] = {"reward_weights": [1.0, 2.0], "combine": "normalize_then_sum"}
    perl_kernels.group_advantages(torch.zeros(_N, 2), [2, 2], **weighted, **_TRITON)


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = (
    Case("token_logprobs, bf16", _token_logprobs(_BF16)),
    Case("token_logprobs, fp32", _token_logprobs(_FP32)),
    Case("linear_token_logprobs, bf16, everything", _linear_token_logprobs(_BF16)),
    Case("linear_token_logprobs, fp16, everything", _linear_token_logprobs(_FP16), COLUMNS[1:2]),
    Case("grpo_loss, bf16, in place", _grpo_loss),
    Case("linear_grpo_loss, bf16", _linear_grpo_loss(_BF16)),
    Case("linear_grpo_loss, fp32 to bf16", _linear_grpo_loss(_BF16, logits_dtype=_FP32)),
    Case("linear_grpo_loss, bf16, everything", _linear_grpo_loss(_BF16, EVERYTHING)),
    Case("linear_grpo_loss, fp32, everything", _linear_grpo_loss(_FP32, EVERYTHING), COLUMNS[1:2]),
    Case("policy_loss, fp32", _policy_loss(PLAIN, _FP32), (0,)),
    Case("policy_loss, bf16, everything", _policy_loss(EVERYTHING, _BF16), (0,)),
    Case("group_advantages, fp32", _group_advantages, (0,)),
)
"""Everything: bias, softcap, a temperature for each row, entropy and its gradient, and the terms of
`EVERYTHING`."""


@dataclass(frozen=True)
class Loop:
    """A loop over the columns of a row: instructions for each, and how often it loads and stores how
    many bits at once."""

    instructions: float
    loads: dict[str, int]
    stores: dict[str, int]


@dataclass(frozen=True)
class Code:
    """A kernel as launched. `shared` and `stack` are bytes, `spills` the instructions that access
    local memory, `blocks` how many thread blocks fit on a multiprocessor at once, `code` the hash
    of the binary."""

    kernel: str
    case: str
    columns: int
    architecture: int
    code: str
    warps: int
    registers: int
    shared: int
    stack: int
    spills: int
    blocks: int
    loops: list[Loop]

    @property
    def occupancy(self) -> float:
        """Warps at once, as a fraction of what a multiprocessor can hold."""
        return self.blocks * self.warps / _WARPS


def measure_all() -> list[Code]:
    """What each case launches on each architecture; the work is spread over processes.

    Raises:
        RuntimeError: TRITON_INTERPRET was set, so that there are no compiled kernels.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set; kernels can not be compiled in this process")
    tasks = [(index, number) for index in range(len(CASES)) for number in ARCHITECTURES]
    torch.set_num_threads(1)
    # Forked processes have the kernels already; they can not be sent to others.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        return [code for found in pool.map(_measure, tasks) for code in found]


def _measure(task: tuple[int, int]) -> list[Code]:
    index, architecture = task
    case = CASES[index]
    found = []
    with pretended(architecture) as launches:
        for columns in case.columns:
            launches.clear()
            case.call(columns)
            for launch in launches:
                read = _read(launch.compiled, launch.elements, architecture)
                found.append(Code(launch.kernel, case.name, columns, architecture, **read))
    return found


def _read(compiled: Any, elements: int, architecture: int) -> dict[str, Any]:
    binary, metadata = compiled.asm["cubin"], compiled.metadata
    usage, code = _dump(binary)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    registers, stack = map(int, found.groups())
    return {
        "code": hashlib.sha256(binary).hexdigest()[:16],
        "warps": metadata.num_warps,
        "registers": registers,
        "shared": metadata.shared,
        "stack": stack,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "blocks": blocks(architecture, metadata.num_warps, registers, metadata.shared),
        "loops": loops(code, elements) if elements else [],
    }


@functools.cache
def _dump(binary: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        return tuple(
            subprocess.run(
                [tool, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )  # type: ignore[return-value]


def loops(code: str, elements: int) -> list[Loop]:
    """The innermost loops of `code`, in SASS, that raise 2 to a power, for `elements` at once."""
    instructions = [
        (int(address, 16), re.sub(r"^@!?\w+\s+", "", text))
        for address, text in re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
    ]
    spans = []
    for address, text in instructions:
        jump = re.match(r"BRA\S*\s.*?0x([0-9a-f]+)", text)
        if jump and int(jump.group(1), 16) < address:
            spans.append((int(jump.group(1), 16), address))
    found = []
    for start, stop in spans:
        if any(start <= a and b <= stop and (a, b) != (start, stop) for a, b in spans):
            continue
        body = [text.split()[0] for address, text in instructions if start <= address <= stop]
        if "MUFU.EX2" in body:
            found.append(Loop(len(body) / elements, _widths(body, "LDG"), _widths(body, "STG")))
    return found


def _widths(body: list[str], operation: str) -> dict[str, int]:
    """How often `operation` moves how many bits, fewest first."""
    counts: Counter[int] = Counter()
    for name in body:
        kind, *parts = name.split(".")
        if kind == operation:
            sizes = [int(part.lstrip("US")) for part in parts if re.fullmatch(r"[US]?\d+", part)]
            counts[sizes[-1] if sizes else 32] += 1
    return {str(bits): counts[bits] for bits in sorted(counts)}


def blocks(architecture: int, warps: int, registers: int, shared: int) -> int:
    """How many blocks fit on a multiprocessor, by the rules of the CUDA occupancy calculator."""
    # A warp's registers come in units of 256, from a quarter of the register file.
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = _REGISTERS // 4 // per_warp * 4 // warps
    by_shared = _SHARED[architecture] // (-(-shared // 128) * 128 + _RESERVED)
    return min(_BLOCKS, _WARPS // warps, by_registers, by_shared)


def markdown(table: list[Code]) -> str:
    """One line for each kernel that differs, with its numbers on each of `ARCHITECTURES`."""
    binaries: dict[tuple[str, int], list[Code]] = {}
    for row in table:
        binaries.setdefault((row.code, row.architecture), []).append(row)
    lines: dict[tuple[str, str, str], dict[int, Code]] = {}
    for rows in binaries.values():
        columns = ", ".join(dict.fromkeys(str(row.columns) for row in rows if row.loops))
        key = (rows[0].kernel, rows[0].case, columns)
        lines.setdefault(key, {})[rows[0].architecture] = rows[0]

    def cells(codes: dict[int, Code], show: Callable[[Code], str]) -> str:
        shown = [show(codes[number]) if number in codes else "" for number in ARCHITECTURES]
        return shown[0] if len(set(shown)) == 1 else " / ".join(shown)

    return "\n".join(
        [
            "| kernel | first launched by | columns | instructions per element | bits of a load, store "
            "| registers | stack | spills | occupancy |",
            "|---|---|--:|--:|--:|--:|--:|--:|--:|",
            *(
                f"| `{kernel}` | {case} | {columns} | {cells(codes, _instructions)} "
                f"| {cells(codes, _moved)} | {cells(codes, lambda x: str(x.registers))} "
                f"| {cells(codes, lambda x: str(x.stack))} | {cells(codes, lambda x: str(x.spills))} "
                f"| {cells(codes, lambda x: f'{x.occupancy:.0%}')} |"
                for (kernel, case, columns), codes in sorted(lines.items())
            ),
        ]
    )


def _instructions(code: Code) -> str:
    return " + ".join(f"{loop.instructions:.1f}" for loop in code.loops)


def _moved(code: Code) -> str:
    """The widest load and store of each loop."""
    return " + ".join(
        ", ".join([*moved][-1] for moved in (loop.loads, loop.stores) if moved)
        for loop in code.loops
    )


def replace_table(document: str, table: str) -> str:
    """`document` with `table` in place of the first one under its heading `HEADING`.

    Raises:
        ValueError: it has no such heading, or no table under it.
    """
    before, heading, rest = document.partition(f"{HEADING}\n")
    replaced, count = re.subn(r"(^\|.*\n)+", lambda _: f"{table}\n", rest, count=1, flags=re.M)
    if not heading or not count:
        raise ValueError(f"the document has no table under a heading {HEADING!r}")
    return before + heading + replaced


def _main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.machine_code", description=__doc__)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--write", type=Path, metavar="DOCUMENT", help="replace the table in it")
    output.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    table = measure_all()
    if options.json:
        print(json.dumps([asdict(row) for row in table], indent=1))
    elif options.write:
        document = options.write.read_text(encoding="utf-8")
        options.write.write_text(replace_table(document, markdown(table)), encoding="utf-8")
    else:
        print(markdown(table))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
