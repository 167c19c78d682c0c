"""Compile every shipped kernel configuration for every supported architecture, without a GPU, and read the machine
code.

ptxas, cuobjdump and nvdisasm come with Triton's wheel, and so does a compiler for AMD, so registers, spills, shared
memory and tensor-core instructions are facts before the first card is at hand. Compiling happens in worker processes: a
process that runs Triton's interpreter (the tests do) cannot also compile. The report file is its own cache: a row is
taken over when its kernel's source, configuration, Triton version and architecture are unchanged.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlocal.profiling import results

if TYPE_CHECKING:
    from fastlocal.kernels.cases import CompileCase

PROCESSES = 2
SAVE_EVERY = 20


@dataclass(frozen=True)
class Architecture:
    """The limits of one compute capability (CUDA C Programming Guide, table "technical specifications") or of one AMD
    processor (its instruction set guide). A warp is AMD's wavefront, a multiprocessor its compute unit."""

    target: int | str  # Triton's: compute capability, or AMD's name
    shared_bytes_per_block: int  # the opt-in maximum
    shared_bytes_per_multiprocessor: int
    warps_per_multiprocessor: int
    blocks_per_multiprocessor: int
    tensor_core_instructions: (
        str  # what a product of bf16 or fp16 tiles compiles to: alternatives of a regular expression
    )
    registers_per_multiprocessor: int = 65536
    registers_allocated_at_once: int = 256  # per warp
    threads_per_warp: int = 32

    @property
    def name(self) -> str:
        return self.target if isinstance(self.target, str) else f"sm_{self.target}"

    @property
    def reserved_shared_bytes(self) -> int:
        """What the system keeps of each block's shared memory."""
        return 1024 if isinstance(self.target, int) and self.target >= 80 else 0


_KIB = 1024
ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture(75, 64 * _KIB, 64 * _KIB, 32, 16, "HMMA"),
        Architecture(80, 163 * _KIB, 164 * _KIB, 64, 32, "HMMA"),
        Architecture(86, 99 * _KIB, 100 * _KIB, 48, 16, "HMMA"),
        Architecture(89, 99 * _KIB, 100 * _KIB, 48, 24, "HMMA"),
        Architecture(90, 227 * _KIB, 228 * _KIB, 64, 32, "HGMMA|HMMA"),
        Architecture(100, 227 * _KIB, 228 * _KIB, 64, 32, "UTC[A-Z]*MMA|HMMA"),
        Architecture(120, 99 * _KIB, 100 * _KIB, 48, 24, "HMMA"),
        # CDNA 3: 4 SIMDs of 512 registers × 64 lanes, vector and accumulation registers in one file.
        Architecture("gfx942", 64 * _KIB, 64 * _KIB, 32, 32, r"v_mfma\w*", 4 * 512 * 64, 8 * 64, 64),
        # RDNA 3 and 4: a compute unit is half of a workgroup processor; 2 SIMDs of 1536 registers × 32 lanes.
        Architecture("gfx1100", 64 * _KIB, 64 * _KIB, 32, 32, r"v_wmma\w*", 2 * 1536 * 32, 24 * 32),
        Architecture("gfx1201", 64 * _KIB, 64 * _KIB, 32, 32, r"v_s?wmma\w*", 2 * 1536 * 32, 24 * 32),
    )
}


@dataclass(frozen=True)
class Measurement:
    """What the compiler made of one kernel configuration on one architecture."""

    case: str
    architecture: str
    dtype: str
    has_dot: bool
    warps: int
    registers: int  # per thread
    spill_bytes: (
        int  # local memory per thread; these kernels declare no local arrays, so all of it is spilled registers
    )
    shared_bytes: int  # per block
    shared_limit: int
    tensor_core_instructions: int  # in the machine code, not executed
    blocks_per_multiprocessor: int
    occupancy: float  # resident warps, of the most the architecture holds
    error: str | None  # why it does not compile
    key: str  # hash of everything the other fields depend on

    @property
    def problems(self) -> list[str]:
        """Why this configuration must not ship; empty if it may."""
        if self.error is not None:
            return [f"does not compile: {self.error}"]
        problems = []
        if self.spill_bytes:
            problems.append(f"spills {self.spill_bytes} bytes per thread")
        if self.shared_bytes > self.shared_limit:
            problems.append(f"needs {self.shared_bytes} bytes of shared memory, the limit is {self.shared_limit}")
        if self.has_dot and self.dtype in ("bfloat16", "float16") and not self.tensor_core_instructions:
            problems.append("has no tensor-core instructions")
        return problems


def compile_report(report_file: Path, architectures: list[str] | None = None, only: str = "") -> list[Measurement]:
    """Measure the cases whose name contains ``only`` on ``architectures`` (all if None), and bring the report up to
    date.

    Rows of ``report_file`` that still describe today's kernels are kept, others are dropped.

    Raises:
        ValueError: no case matches ``only``.
    """
    known = {(m.key, m.architecture): m for m in read_report(report_file)}
    # Workers start from nothing, so that they import Triton with the interpreter off whatever this process did.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=context, initializer=_stop_interpreting) as pool:
        wanted = pool.submit(_list_cases).result()
        current = {(key, architecture): known.get((key, architecture)) for _, key, architecture in wanted}
        for name, key, architecture in wanted:
            if (measurement := current[key, architecture]) is not None:
                current[key, architecture] = replace(measurement, case=name)  # renaming a case changes no code
        selected = [
            (name, key, architecture)
            for name, key, architecture in wanted
            if only in name and (architectures is None or architecture in architectures)
        ]
        if not selected:
            raise ValueError(f"no kernel configuration has {only!r} in its name.")
        missing = {
            pool.submit(_measure, name, key, architecture): (key, architecture)
            for name, key, architecture in selected
            if current[key, architecture] is None
        }
        try:
            for done, future in enumerate(as_completed(missing), 1):
                current[missing[future]] = future.result()
                print(f"\rcompiled {done}/{len(missing)}", end="", file=sys.stderr, flush=True)
                if done % SAVE_EVERY == 0:
                    _write_report(report_file, current)
        finally:
            if missing:
                print(file=sys.stderr)
            pool.shutdown(wait=False, cancel_futures=True)
            _write_report(report_file, current)
    return [m for _, key, architecture in selected if (m := current[key, architecture]) is not None]


def read_report(report_file: Path) -> list[Measurement]:
    """The rows of a report, none if there is no such file or it was written by a version with other fields."""
    if not report_file.exists():
        return []
    rows = json.loads(report_file.read_text())["rows"]
    fields = set(Measurement.__dataclass_fields__)
    return [Measurement(**row) for row in rows if set(row) == fields]


def _write_report(report_file: Path, measurements: Mapping[tuple[str, str], Measurement | None]) -> None:
    report_file.parent.mkdir(parents=True, exist_ok=True)
    # One row a line, so that a diff shows what changed.
    rows = ",\n".join(json.dumps(vars(m)) for m in measurements.values() if m is not None)
    report_file.write_text(f'{{"origin": {json.dumps(results.origin())},\n"rows": [\n{rows}\n]}}\n')


def table(measurements: list[Measurement]) -> str:
    """One row per kernel configuration, one column per architecture, and under it what each cell says."""
    rows: dict[str, dict[str, str]] = {}
    for m in measurements:
        row = rows.setdefault(m.case, {"case": m.case, "warps": str(m.warps)})
        if m.error is not None:
            row[m.architecture] = "does not compile"
        else:
            shared = f"{m.shared_bytes / 1024:.0f}"
            tensor = str(m.tensor_core_instructions) if m.has_dot else "–"
            spills = f"**{m.spill_bytes}**" if m.spill_bytes else "0"
            row[m.architecture] = f"{m.registers} · {spills} · {shared} · {tensor} · {m.occupancy:.0%}"
    names = [name for name in ARCHITECTURES if any(name in row for row in rows.values())]
    columns = {"case": "kernel configuration", "warps": "warps", **{name: name for name in names}}
    legend = (
        "Each cell: registers · spilled bytes per thread · shared KiB · tensor-core instructions · occupancy "
        "(estimated)."
    )
    return f"{results.markdown_table(list(rows.values()), columns)}\n\n{legend}"


# --- In the workers ---------------------------------------------------------------------------------------------------


def _stop_interpreting() -> None:
    if "triton" in sys.modules:
        raise RuntimeError("triton was imported before the interpreter could be switched off.")
    os.environ.pop("TRITON_INTERPRET", None)


def _cases() -> dict[str, CompileCase]:
    """Every shipped configuration of every kernel, by name: whatever the ``*_triton`` files say they launch."""
    import fastlocal.kernels

    cases: dict[str, CompileCase] = {}
    for module in pkgutil.iter_modules(fastlocal.kernels.__path__):
        if module.name.endswith("_triton"):
            for case in importlib.import_module(f"fastlocal.kernels.{module.name}").compile_cases():
                if case.name in cases:
                    raise ValueError(f"two compile cases are called {case.name!r}.")
                cases[case.name] = case
    return cases


def _list_cases() -> list[tuple[str, str, str]]:
    """Every (case name, key, architecture name) of a full report."""
    return [(case.name, _key(case), name) for case in _cases().values() for name in _architectures_of(case)]


def _architectures_of(case: CompileCase) -> list[str]:
    """Where a case is reported: everywhere from compute capability 8.0, and on 7.5 without a product or bfloat16. In
    float16, whose code is bfloat16's, on 8.0 only, where registers are tightest.

    Products in float32 are left out: exact ones run without tensor cores, for checking, and may spill.
    """
    dtype = str(case.dtype).removeprefix("torch.")
    if case.has_dot and dtype == "float32":
        return []
    if dtype == "float16":
        return ["sm_80"]
    lowest = 80 if case.has_dot or dtype == "bfloat16" else 75
    return [name for name, a in ARCHITECTURES.items() if isinstance(a.target, str) or a.target >= lowest]


def _key(case: CompileCase) -> str:
    """Hash of what a measurement depends on; comments and the place in the file do not count."""
    import triton

    parts = [triton.__version__, *_sources(case.kernel, set())]
    parts += [str(sorted(case.signature.items())), str(sorted(case.constexprs.items(), key=str))]
    parts += [str((case.num_warps, case.num_stages, case.dtype, case.has_dot))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _sources(function: Any, seen: set[str]) -> list[str]:
    """The code of a JIT function and of every JIT function and constant it names, without comments."""
    if function.__name__ in seen:
        return []
    seen.add(function.__name__)
    tree = ast.parse(function.src)
    sources = [ast.unparse(tree)]
    for name in sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}):
        value = function.fn.__globals__.get(name)
        if hasattr(value, "src"):
            sources += _sources(value, seen)
        elif hasattr(value, "value"):  # a global tl.constexpr
            sources.append(f"{name} = {value.value!r}")
    return sources


def _measure(name: str, key: str, architecture_name: str) -> Measurement:
    return measure(_cases()[name], ARCHITECTURES[architecture_name], key)


def measure(case: CompileCase, architecture: Architecture, key: str) -> Measurement:
    """Compile one case for one architecture, which need not be present. The interpreter must be off."""
    from fastlocal.kernels.cases import narrower

    facts: dict[str, Any] = {
        "case": case.name,
        "architecture": architecture.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "has_dot": case.has_dot,
        "warps": narrower(case.num_warps, architecture.threads_per_warp),
        "shared_limit": architecture.shared_bytes_per_block,
        "key": key,
    }
    try:
        compiled = _compile(case, architecture)
    except Exception as error:
        nothing: dict[str, Any] = dict.fromkeys(
            ("registers", "spill_bytes", "shared_bytes", "tensor_core_instructions", "blocks_per_multiprocessor"), 0
        )
        reason = (str(error).strip() or repr(error)).split("\n")[0]
        return Measurement(**facts, **nothing, occupancy=0.0, error=reason)

    registers, spill_bytes, machine_code = _amd_code(compiled) if "amdgcn" in compiled.asm else _nvidia_code(compiled)
    shared = int(compiled.metadata.shared)
    blocks = resident_blocks(architecture, compiled.metadata.num_warps, registers, shared)
    return Measurement(
        **facts,
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=shared,
        tensor_core_instructions=len(re.findall(rf"\b(?:{architecture.tensor_core_instructions})\b", machine_code)),
        blocks_per_multiprocessor=blocks,
        occupancy=blocks * compiled.metadata.num_warps / architecture.warps_per_multiprocessor,
        error=None,
    )


def _compile(case: CompileCase, architecture: Architecture) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastlocal.kernels.cases import FUSION, narrower

    # ASTSource wants every argument in the signature, in order, and pointers' alignment as an attribute.
    signature = {name: case.signature.get(name, "constexpr") for name in case.kernel.arg_names}
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    return triton.compile(
        ASTSource(case.kernel, signature, dict(case.constexprs), attributes),
        target=GPUTarget(
            "hip" if isinstance(architecture.target, str) else "cuda",
            architecture.target,
            architecture.threads_per_warp,
        ),
        options={
            "num_warps": narrower(case.num_warps, architecture.threads_per_warp),
            "num_stages": case.num_stages,
            **FUSION,
        },
    )


def _nvidia_code(compiled: Any) -> tuple[int, int, str]:
    """Registers and spilled bytes per thread, as cuobjdump says, and the machine code as text."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        machine_code = _run(knobs.nvidia.nvdisasm.path, "-c", file.name)
    spilled = sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
    return int(re.findall(r"REG:(\d+)", usage)[-1]), spilled, machine_code


def _amd_code(compiled: Any) -> tuple[int, int, str]:
    """The same from the assembly's own metadata. Scalar registers that spill into lanes of vector ones touch no memory."""
    assembly = compiled.asm["amdgcn"]
    registers, scratch = (
        int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[-1]) for name in ("vgpr_count", "private_segment_fixed_size")
    )
    return registers, scratch, assembly


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resident_blocks(architecture: Architecture, warps: int, registers: int, shared_bytes: int) -> int:
    """Blocks of ``warps`` warps that one multiprocessor holds at once, by the vendor's occupancy rules."""
    at_once = architecture.registers_allocated_at_once
    registers_per_warp = -(-registers * architecture.threads_per_warp // at_once) * at_once
    by_registers = architecture.registers_per_multiprocessor // registers_per_warp // warps
    by_shared = architecture.shared_bytes_per_multiprocessor // max(
        1, shared_bytes + architecture.reserved_shared_bytes
    )
    by_warps = architecture.warps_per_multiprocessor // warps
    return min(by_registers, by_shared, by_warps, architecture.blocks_per_multiprocessor)
