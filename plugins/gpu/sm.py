"""GPU architectures that kernels are compiled for, and what one multiprocessor of each holds.

Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; PTX ISA, release notes
(the first PTX version of each architecture). 8.0 is the least that Triton writes for the older ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_export.errors import UsageError, choices_text


@dataclass(frozen=True)
class Sm:
    """One architecture. ``shared_bytes``: for all blocks of one multiprocessor, 1 KiB of each block is the
    system's."""

    name: str
    number: int
    ptx_version: int
    warps: int
    blocks: int
    shared_bytes: int
    registers: int = 65536

    def occupancy(self, registers: int, shared_bytes: int, warps: int) -> float:
        """Share of the multiprocessor's warps that can be resident, by registers per thread, dynamic shared
        memory and warps per block."""
        per_warp = -(-max(registers, 1) * 32 // 256) * 256
        by_registers = self.registers // per_warp // warps
        by_shared = self.shared_bytes // (-(-(shared_bytes + 1024) // 128) * 128)
        blocks = min(by_registers, by_shared, self.warps // warps, self.blocks)
        return blocks * warps / self.warps


_KIB = 1024
SMS: dict[str, Sm] = {
    s.name: s
    for s in (
        Sm("sm_80", 80, 80, 64, 32, 164 * _KIB),
        Sm("sm_86", 86, 80, 48, 16, 100 * _KIB),
        Sm("sm_89", 89, 80, 48, 24, 100 * _KIB),
        Sm("sm_90a", 90, 80, 64, 32, 228 * _KIB),
        Sm("sm_100a", 100, 86, 64, 32, 228 * _KIB),
        Sm("sm_103a", 103, 88, 64, 32, 228 * _KIB),
        Sm("sm_110a", 110, 90, 48, 24, 228 * _KIB),
        Sm("sm_120a", 120, 87, 48, 24, 100 * _KIB),
        Sm("sm_121a", 121, 88, 48, 24, 100 * _KIB),
    )
}


def find_sm(name: str | int) -> Sm:
    """The architecture called ``name``: 80, "80", "sm_80", "SM80", "9.0", "90" and "90a" are understood.

    Raises:
        UsageError: kernels are not compiled for it; the message lists the choices.
    """
    digits = str(name).lower().removeprefix("sm").removeprefix("_").rstrip("a").replace(".", "")
    for sm in SMS.values():
        if digits == str(sm.number):
            return sm
    raise UsageError(f"no GPU kernels for SM {name!r}; {choices_text(str(name), SMS)}")
