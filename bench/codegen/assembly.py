"""What machine code does: its loops, its accesses to global memory, how it reduces.

NVIDIA's is read from the cubin with the tools that come with Triton, AMD's from the assembly text.
Both become the same list of instructions.
"""

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Access widths by AMD's names, in bits.
AMD_WIDTHS = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
ATOMIC = r"ATOM(G|\b)|RED\b|(global|buffer|flat)_atomic_"
# NVIDIA prints code one instruction in 16 bytes.
INSTRUCTION_BYTES = 16


@dataclass(frozen=True)
class Instruction:
    """One machine instruction."""

    opcode: str  # with its suffixes, without a predicate
    text: str  # all of it
    target: int | None = None  # the position in the list to which it may branch


@dataclass(frozen=True)
class Code:
    """One compiled kernel."""

    instructions: list[Instruction]
    registers: int  # vector registers a thread
    spills: int  # accesses to the stack (NVIDIA), or registers spilled to it (AMD)
    stack: int  # bytes of it a thread, which may be reserved and not used


def read_cubins(cubins: Sequence[bytes], arch: int) -> list[Code]:
    """Read kernels of one architecture (its compute capability times ten).

    One call of the disassembler reads all: it takes a third of a second to start.
    """
    texts = [_text_section(cubin) for cubin in cubins]
    sass = _tool("nvdisasm", b"".join(texts), "-b", f"SM{arch}")
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", sass)
    by_address = {
        int(address, 16): (opcode, f"{predicate}{opcode}{operands}")
        for address, predicate, opcode, operands in lines
    }
    codes = []
    start = 0
    for cubin, text in zip(cubins, texts, strict=True):
        addresses = range(start, start + len(text), INSTRUCTION_BYTES)
        instructions = [
            _nvidia_instruction(*by_address[address], start)
            for address in addresses
            if address in by_address
        ]
        start += len(text)
        usage = _tool("cuobjdump", cubin, "-res-usage")
        registers, stack = (int(_search(rf"{name}:(\d+)", usage)) for name in ("REG", "STACK"))
        codes.append(Code(instructions, registers, len(_find(instructions, r"LDL|STL")), stack))
    return codes


def read_amdgcn(assembly: str) -> Code:
    """Read a kernel in AMD's assembly language."""
    body = assembly[: assembly.index(".section")] if ".section" in assembly else assembly
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for line in body.splitlines():
        text = line.partition(";")[0].strip()
        label = re.fullmatch(r"(\.?\w+):", text)
        if label:
            labels[label[1]] = len(lines)
        elif re.match(r"[a-z]+_", text):
            lines.append((text.split()[0], text))
    instructions = [
        Instruction(opcode, text, labels.get(text.split()[-1]) if "branch" in opcode else None)
        for opcode, text in lines
    ]

    def number(name: str) -> int:
        return int(_search(rf"\.{name}:\s+(\d+)", assembly))

    stack = number("private_segment_fixed_size")
    # Without a stack, what is spilled goes to registers of another kind, and not to memory.
    spills = number("vgpr_spill_count") + number("sgpr_spill_count") if stack else 0
    return Code(instructions, number("vgpr_count"), spills, stack)


def hot_loop(code: Code) -> list[Instruction]:
    """Return the loop over whole tiles.

    Both compilers keep the order of the source, in which it is the first loop; the one over what is
    left follows. Without a loop this is empty.
    """
    # (Of several branches back to one instruction, the last ends the loop.)
    loops = {
        instruction.target: end
        for end, instruction in enumerate(code.instructions)
        if instruction.target is not None and instruction.target <= end
    }
    innermost = (
        code.instructions[start : end + 1]
        for start, end in sorted(loops.items())
        if not any(start <= s and e <= end for s, e in loops.items() if s != start)
    )
    return next((loop for loop in innermost if loads(loop) or stores(loop)), [])


def loads(instructions: Iterable[Instruction]) -> Counter[int]:
    """Count the loads from global memory by width in bits."""
    return _accesses(instructions, r"LDG\b|LD\.|(global|buffer|flat)_load_(?!lds)")


def stores(instructions: Iterable[Instruction]) -> Counter[int]:
    """Count the stores to global memory by width in bits."""
    return _accesses(instructions, r"STG\b|ST\.|(global|buffer|flat)_store_")


def atomics(code: Code) -> list[str]:
    """Return the opcodes of the atomic operations on global memory."""
    return [code.instructions[at].opcode for at in _find(code.instructions, ATOMIC)]


def ticket_steps(code: Code) -> list[str]:
    """Return which steps around the ticket, the only atomic operation, are there in their order.

    "store": the partial sum; "barrier": of the program, after it; "release": wait for all stores,
    after it, before or after the barrier; "ticket"; "acquire": drop what the first-level cache
    holds; "past L1": every load that follows ignores that cache, or is after its invalidation. All
    six are needed.
    """
    tickets = _find(code.instructions, ATOMIC)
    if not tickets:
        return []
    before, after = code.instructions[: tickets[0]], code.instructions[tickets[0] + 1 :]
    stored = [at for at, instruction in enumerate(before) if stores([instruction])]
    steps = ["store"] if stored else []
    between = before[stored[-1] + 1 :] if stored else before
    steps += ["barrier"] if _find(between, r"BAR\.|s_barrier") else []
    steps += ["release"] if any(map(_is_release, between)) else []
    steps.append("ticket")
    read = [instruction for instruction in after if loads([instruction])]
    until_read = after[: after.index(read[0])] if read else after
    acquires = _find(until_read, r"CCTL\.IVALL|buffer_inv|buffer_gl0_inv|buffer_wbinvl1")
    steps += ["acquire"] if acquires else []
    if read and all(_is_past_l1(instruction, bool(acquires)) for instruction in read):
        steps.append("past L1")
    return steps


def _is_release(instruction: Instruction) -> bool:
    waits = r"MEMBAR|s_waitcnt_vscnt null, 0x0|s_waitcnt .*vmcnt\(0\)"
    return re.search(waits, instruction.text) is not None


def _is_past_l1(load: Instruction, is_after_invalidation: bool) -> bool:
    if load.opcode.startswith("LD"):
        return ".STRONG.GPU" in load.opcode
    return is_after_invalidation or re.search(r"\b(glc|sc0|sc1)\b", load.text) is not None


def _accesses(instructions: Iterable[Instruction], opcode: str) -> Counter[int]:
    return Counter(_width(i.opcode) for i in instructions if re.match(opcode, i.opcode))


def _width(opcode: str) -> int:
    if opcode[0].isupper():
        suffix = re.search(r"\.[US]?(8|16|64|128|256)\b", opcode)
        return int(suffix[1]) if suffix else 32
    name = re.sub(r"^(global|buffer|flat)_(load|store)_", "", opcode)
    # Which half of a register 16 bits go to is part of the name: load_d16_hi_u8, load_short_d16_hi.
    name = re.sub(r"(^|_)(d16|hi)(?=_|$)", "", name).lstrip("_")
    digits = re.fullmatch(r"[uib](\d+)", name)
    return int(digits[1]) if digits else AMD_WIDTHS[re.sub(r"^[us](?=byte|short)", "", name)]


def _nvidia_instruction(opcode: str, text: str, start: int) -> Instruction:
    # Some versions print how the instruction is scheduled after it.
    pattern = r"\b0x([0-9a-f]+)\s*($|[&?])"
    address = re.search(pattern, text) if opcode.startswith("BRA") else None
    target = (int(address[1], 16) - start) // INSTRUCTION_BYTES if address else None
    return Instruction(opcode, text, target)


def _text_section(cubin: bytes) -> bytes:
    """Return the machine code in a cubin, an ELF file of 64 bits with one kernel."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, number, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(number)]
    names_at = sections[names][4]
    (code,) = (
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin.startswith(b".text.", names_at + name)
    )
    return code


def _tool(name: str, binary: bytes, *options: str) -> str:
    import triton

    tool: Any = getattr(triton.knobs.nvidia, name)
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        Path(file.name).write_bytes(binary)
        command = [tool.path, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _search(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"nothing matches {pattern!r} in the compiler's output")
    return found[1]


def _find(instructions: Sequence[Instruction], opcode: str) -> list[int]:
    """Return the positions of the instructions whose opcode begins with this pattern."""
    return [at for at, one in enumerate(instructions) if re.match(opcode, one.opcode)]
