"""Instructions and registers of Metal kernels, as clang compiles them for a GPU.

Nobody outside of Apple knows what its compiler makes of a kernel. Clang's code for an
AMD GPU (gfx1030, whose simdgroups have 32 lanes too) is another compiler's for another
machine, but tells what is comparable: how much arithmetic an element takes, and whether
a thread's variables fit into registers.

    python -m metal_simulator.instructions kernels.metal    (in the folder tests)
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from .compile_kernels import (
    LANGUAGE,
    CompileError,
    call_of,
    include_flags,
    preprocess,
    without_metal,
    zig,
)

__all__ = ["KernelInstructions", "count", "table"]

FLAGS = [
    *LANGUAGE,
    *("-target", "amdgcn-amd-amdhsa", "-mcpu=gfx1030", "-nogpulib", "-O3"),
    # As Metal in its safe mode, with the functions that keep to IEEE.
    *("-ffp-contract=fast-honor-pragmas", "-fno-math-errno", "-cl-denorms-are-zero"),
    "-cl-fp32-correctly-rounded-divide-sqrt",
    # A kernel is a function that the entry calls.
    *("-mllvm", "-amdgpu-function-calls=0"),
]


@dataclass(frozen=True)
class KernelInstructions:
    """What a kernel consists of. An instruction in a loop counts once."""

    kernel: str
    vector: int  # arithmetic of all lanes
    scalar: int  # of the simdgroup as a whole: addresses, branches
    memory: int  # of device, constant, threadgroup and private memory
    registers: int  # 32 bits wide, of each thread
    scratch: int  # bytes of each thread's variables that are in memory
    spills: int  # registers that are kept in memory for lack of room


def count(
    source: str, name: str = "kernel", include: tuple[str, ...] = ()
) -> list[KernelInstructions]:
    """Counts for the kernels in `source`, in the order of their instantiation.

    Args:
        source: Metal Shading Language, with the instantiations of its templates.
        name: names the source's lines in messages.
        include: folders for ``#include``.

    Raises:
        CompileError: with the compiler's message.
    """
    flags = [*FLAGS, *include_flags(include)]
    text, kernels = without_metal(preprocess(source, name, flags), "off|on|fast")
    lines = ["", '# 1 "entries"']
    lines.append("#pragma OPENCL EXTENSION __cl_clang_function_pointers : enable")
    for number, kernel in enumerate(kernels):
        call, _ = call_of(kernel, "attributes")
        lines += [
            f'extern "C" __kernel void simulator_entry_{number}('
            "constant const simulator::Arguments* a) {",
            "  uint attributes[11][3]; simulator::tell_place(attributes);",
            f"  {call};",
            "}",
        ]
    unit = "\n".join([text, *lines, ""])
    assembly = zig(["clang", *flags, "-S", "-o", "-", "-"], unit)
    return [
        _counted(kernel.name, f"simulator_entry_{number}", assembly)
        for number, kernel in enumerate(kernels)
    ]


def _counted(kernel: str, symbol: str, assembly: str) -> KernelInstructions:
    body = re.search(rf"(?ms)^{symbol}:(.*?)^\.Lfunc_end", assembly)
    # An entry of a list in YAML: no other begins before the symbol.
    entry = rf"(?ms)^  - \.args:(?:(?!^  - ).)*?{symbol}\.kd.*?(?=^  - |^amd)"
    facts = re.search(entry, assembly)
    if body is None or facts is None:
        raise CompileError(f"{kernel}: clang's assembly is not understood")
    opcodes = re.findall(r"(?m)^\t([a-z]\w+)", body[1])

    def having(*prefixes: str) -> int:
        return sum(opcode.startswith(prefixes) for opcode in opcodes)

    def fact(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", facts[0])
        if found is None:
            raise CompileError(f"{kernel}: clang does not tell its {name}")
        return int(found[1])

    loads = having("s_load", "s_buffer_load")
    waits = having("s_waitcnt", "s_code_end", "s_nop", "s_clause", "s_inst_prefetch")
    return KernelInstructions(
        kernel=kernel,
        vector=having("v_"),
        scalar=having("s_") - loads - waits,
        memory=having("global_", "flat_", "ds_", "buffer_", "scratch_") + loads,
        registers=fact("vgpr_count"),
        scratch=fact("private_segment_fixed_size"),
        # Scalars have registers of their own there, and spill to those of the lanes.
        spills=fact("vgpr_spill_count"),
    )


def table(kernels: list[KernelInstructions]) -> str:
    """The counts in Markdown."""
    head = [field.name for field in fields(KernelInstructions)]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    lines += [[str(getattr(kernel, key)) for key in head] for kernel in kernels]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    """Print the table of a file's kernels; returns the exit code."""
    parser = argparse.ArgumentParser(description="Count instructions of MSL kernels.")
    parser.add_argument("source", type=Path)
    parser.add_argument("-I", dest="include", action="append", default=[])
    options = parser.parse_args()
    try:
        source = options.source.read_text()
        include = (str(options.source.parent), *options.include)
        print(table(count(source, options.source.stem, include)), end="")
    except CompileError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
