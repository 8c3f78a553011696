"""GPUs by their data sheets. Peaks are dense (no sparsity), with float32 accumulation where sheets tell both.

Sheets give memory in GB; it is taken as 10^9 bytes, which is a little less than the boards have. Link
bandwidth is one direction per GPU: half of what sheets call total NVLink bandwidth, or PCIe x16. The network
is that of the vendor's 8-GPU system where it is sold with one; otherwise an assumption, which ``note`` says.
Numbers of multiprocessors: NVIDIA's white papers of the architectures (A100, H100, Ada, RTX Blackwell); that
of H200 is H100's, whose chip it has; that of B200 is in no data sheet and was read off a device by
https://chipsandcheese.com/p/nvidias-b200-keeping-the-cuda-juggernaut.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_export.errors import UsageError, choices_text

_GB, _TERA = 1e9, 1e12


@dataclass(frozen=True)
class Gpu:
    """One GPU. Bytes, bytes per second, and operations per second by compute format.

    ``node``: GPUs that ``link`` connects; beyond them ``network`` (bytes per second and direction, per GPU).
    ``sm``: compute capability times ten. ``multiprocessors``: streaming multiprocessors of the board.
    """

    name: str
    title: str
    memory: float
    bandwidth: float
    peaks: dict[str, float]
    link: float
    node: int
    network: float
    source: str
    sm: int
    multiprocessors: int
    note: str = ""

    def peak(self, compute: str) -> float:
        """Operations per second in a compute format; formats it lacks run in the next wider one it has."""
        if compute == "float8" and compute not in self.peaks:
            compute = "bfloat16"
        return self.peaks[compute]

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values, units in the names."""
        return {
            "name": self.name,
            "title": self.title,
            "memory_bytes": int(self.memory),
            "bandwidth_bytes_per_s": self.bandwidth,
            "peak_flops": dict(self.peaks),
            "link_bytes_per_s": self.link,
            "gpus_per_node": self.node,
            "network_bytes_per_s": self.network,
            "source": self.source,
            "sm": self.sm,
            "multiprocessors": self.multiprocessors,
            "note": self.note,
        }


def _gpu(
    name: str,
    title: str,
    memory: float,
    bandwidth: float,
    peaks: tuple[float, float, float | None],
    link: float,
    network: float,
    processors: tuple[int, int],
    source: str,
    note: str = "",
) -> Gpu:
    """Memory in GB, bandwidths in GB/s, peaks in TFLOPS of float32, 16 bits and float8; SM and number of
    multiprocessors."""
    names = ("float32", "bfloat16", "float8")
    return Gpu(
        name,
        title,
        memory * _GB,
        bandwidth * _GB,
        {n: p * _TERA for n, p in zip(names, peaks, strict=True) if p is not None},
        link * _GB,
        8,
        network * _GB,
        source,
        *processors,
        note,
    )


_PCIE4 = "PCIe 4.0 x16 between GPUs; the network of 12.5 GB/s (100 Gb/s) is an assumption"
_PCIE5 = "PCIe 5.0 x16 between GPUs; the network of 12.5 GB/s (100 Gb/s) is an assumption"

_A100 = (
    "NVIDIA A100 Tensor Core GPU data sheet, https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/"
    "a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf; NVIDIA DGX A100 data sheet (8 x 200 Gb/s)"
)
_HALVED = "its tensor peaks are with sparsity: halved"

GPUS: dict[str, Gpu] = {
    g.name: g
    for g in (
        _gpu("a100-40", "A100 SXM 40 GB", 40, 1555, (19.5, 312, None), 300, 25, (80, 108), _A100),
        _gpu("a100-80", "A100 SXM 80 GB", 80, 2039, (19.5, 312, None), 300, 25, (80, 108), _A100),
        _gpu(
            "h100", "H100 SXM 80 GB", 80, 3350, (67, 989.5, 1979), 450, 50, (90, 132),
            f"NVIDIA H100 Tensor Core GPU data sheet ({_HALVED}), "
            "https://resources.nvidia.com/en-us-gpu-resources/h100-datasheet-24306; "
            "NVIDIA DGX H100 data sheet (8 x 400 Gb/s)",
        ),
        _gpu(
            "h200", "H200 SXM 141 GB", 141, 4800, (67, 989.5, 1979), 450, 50, (90, 132),
            f"NVIDIA H200 Tensor Core GPU, specifications ({_HALVED}), "
            "https://www.nvidia.com/en-us/data-center/h200/; NVIDIA DGX H200 data sheet (8 x 400 Gb/s)",
        ),
        _gpu(
            "b200", "HGX B200 180 GB", 180, 7700, (75, 2250, 4500), 900, 50, (100, 148),
            f"NVIDIA Blackwell data sheet, HGX B200, individual GPU ({_HALVED}), "
            "https://nvdam.widen.net/s/wwnsxrhm2w",
            "the DGX B200 data sheet, https://resources.nvidia.com/en-us-dgx-systems/dgx-b200-datasheet, "
            "tells 64 TB/s for 8 GPUs, which is 8000 GB/s each",
        ),
        _gpu(
            "l4", "L4 24 GB", 24, 300, (30.3, 121, 242.5), 32, 12.5, (89, 58),
            f"NVIDIA L4 Tensor Core GPU, specifications ({_HALVED}), "
            "https://www.nvidia.com/en-us/data-center/l4/", _PCIE4,
        ),
        _gpu(
            "l40s", "L40S 48 GB", 48, 864, (91.6, 362.05, 733), 32, 12.5, (89, 142),
            "NVIDIA L40S data sheet, https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413", _PCIE4,
        ),
        _gpu(
            "rtx-4090", "GeForce RTX 4090 24 GB", 24, 1008, (82.6, 165.2, 330.3), 32, 12.5, (89, 128),
            "NVIDIA Ada GPU Architecture white paper, appendix A (FP32 accumulation), "
            "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
            _PCIE4 + "; GeForce boards copy through the host's memory",
        ),
        _gpu(
            "rtx-5090", "GeForce RTX 5090 32 GB", 32, 1792, (104.8, 209.5, 419), 64, 12.5, (120, 170),
            "NVIDIA RTX Blackwell GPU Architecture white paper (FP32 accumulation), https://images.nvidia.com/"
            "aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf",
            _PCIE5 + "; GeForce boards copy through the host's memory",
        ),
    )
}  # fmt: skip


def find_gpu(name: str) -> Gpu:
    """The GPU called ``name``; case, dashes, spaces and underscores do not matter.

    Raises:
        UsageError: there is none; the message names the nearest.
    """
    for known, gpu in GPUS.items():
        if _letters(known) == _letters(name):
            return gpu
    raise UsageError(f"no GPU {name!r}; {choices_text(name.lower(), GPUS)}")


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
