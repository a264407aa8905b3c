"""What the compiled kernels take of a GPU: registers, shared memory, spills, occupancy.

    python -m perl_kernels.resources [--write docs/kernels.md | --json]

compiles every launch variant that the kernel modules list, for sm_80, sm_90 and sm_100 as far as it
runs there, and reads the machine code. Needs Triton and no GPU.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

try:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ModuleNotFoundError:
    sys.exit("error: triton is not installed; pip install triton")

from .triton_backend.compile_case import CompileCase

MODULES = ("rows", "preparation", "losses", "advantage", "persistent")
HEADING = "## Resources"

_REGISTERS, _WARPS, _BLOCKS, _TENSOR_COLUMNS = 65536, 64, 32, 512
# Of one multiprocessor, in bytes; the driver takes 1 KB of it for each block.
_SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
_RESERVED = 1024


@dataclass(frozen=True)
class Resources:
    """One compiled variant. `shared` and `stack` are bytes, `spills` the instructions that access
    local memory, `blocks` how many thread blocks fit on a multiprocessor at once."""

    kernel: str
    variant: str
    architecture: int
    warps: int
    registers: int
    shared: int
    stack: int
    spills: int
    blocks: int
    has_vector_loads: bool
    has_wgmma: bool
    wants_vector_loads: bool
    wants_wgmma: bool

    @property
    def occupancy(self) -> float:
        """Warps at once, as a fraction of what a multiprocessor can hold."""
        return self.blocks * self.warps / _WARPS


def measure_all() -> list[Resources]:
    """Every variant of every kernel module on every architecture, compiled in parallel.

    Raises:
        RuntimeError: TRITON_INTERPRET was set, so that there are no compiled kernels.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set; kernels can not be compiled in this process")
    tasks = [
        (module, index, architecture)
        for module in MODULES
        for index, case in enumerate(_cases(module))
        for architecture in case.architectures
    ]
    # Forked processes have the kernels already; they can not be sent to others.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        return list(pool.map(_measure, tasks))


def markdown(table: list[Resources]) -> str:
    """One row for each variant and architecture."""
    lines = [
        "| kernel | variant | GPU | warps | registers | shared memory | stack | spills "
        "| blocks per SM | occupancy |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in table:
        lines.append(
            f"| `{row.kernel}` | {row.variant} | sm_{row.architecture} | {row.warps} "
            f"| {row.registers} | {row.shared} | {row.stack} | {row.spills} | {row.blocks} "
            f"| {row.occupancy:.0%} |"
        )
    return "\n".join(lines)


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


@functools.cache
def _cases(module: str) -> tuple[CompileCase, ...]:
    return tuple(importlib.import_module(f"{__package__}.triton_backend.{module}").compile_cases())


def _measure(task: tuple[str, int, int]) -> Resources:
    module, index, architecture = task
    case = _cases(module)[index]
    compiled = triton.compile(
        _source(case),
        target=GPUTarget("cuda", architecture, 32),
        options={
            "num_warps": case.num_warps,
            "num_stages": case.num_stages,
            "maxnreg": case.max_registers,
        },
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = _dump(file.name, "-res-usage"), _dump(file.name, "-sass")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    registers, stack = map(int, found.groups())
    metadata = compiled.metadata
    return Resources(
        kernel=case.kernel.__name__,
        variant=case.name,
        architecture=architecture,
        warps=metadata.num_warps,
        registers=registers,
        shared=metadata.shared,
        stack=stack,
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        blocks=_blocks(
            architecture, metadata.num_warps, registers, metadata.shared, metadata.tmem_size or 0
        ),
        has_vector_loads=bool(
            re.search(r"\b(?:LDG|LDGSTS)\.E\S*\.(?:128|256)\b|\bUTMALDG\b", code)
        ),
        has_wgmma="HGMMA" in code,
        wants_vector_loads=case.vector_loads,
        wants_wgmma=case.wgmma and architecture == 90,
    )


def _source(case: CompileCase) -> ASTSource:
    """As the launcher would compile it for arguments of these types and alignments.

    Raises:
        ValueError: the case does not name the arguments of its kernel.
    """
    names = case.kernel.arg_names
    unknown = {*case.signature, *case.constexprs, *case.divisible_by_16} - {*names}
    missing = {*names} - {*case.signature, *case.constexprs}
    if unknown or missing:
        raise ValueError(
            f"{case.kernel.__name__}, {case.name}: unknown arguments {sorted(unknown)}, "
            f"missing arguments {sorted(missing)}"
        )
    signature = {
        name: "constexpr" if name in case.constexprs else case.signature[name] for name in names
    }
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible_by_16}
    return ASTSource(case.kernel, signature, dict(case.constexprs), aligned)


def _dump(cubin: str, option: str) -> str:
    tool = knobs.nvidia.cuobjdump.path
    done = subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True)
    return done.stdout


def _blocks(architecture: int, warps: int, registers: int, shared: int, tensor_columns: int) -> int:
    """How many blocks fit on a multiprocessor, by the rules of the CUDA occupancy calculator."""
    # A warp's registers come in units of 256, from a quarter of the register file.
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = _REGISTERS // 4 // per_warp * 4 // warps
    by_shared = _SHARED[architecture] // (-(-shared // 128) * 128 + _RESERVED)
    limits = [_BLOCKS, _WARPS // warps, by_registers, by_shared]
    if tensor_columns:
        limits.append(_TENSOR_COLUMNS // tensor_columns)
    return min(limits)


def _main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m perl_kernels.resources", description=__doc__)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--write", type=Path, metavar="DOCUMENT", help="replace the table in it")
    output.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    if knobs.runtime.interpret:
        # The kernels are defined for the interpreter in this process.
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "perl_kernels.resources", *(arguments or sys.argv[1:])]
        return subprocess.run(command, env=environment).returncode
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
