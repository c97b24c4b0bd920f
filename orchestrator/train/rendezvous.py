"""What the workers agree on before the first step."""

from pathlib import Path

import torch


def wants_bf16(precision: str, device: torch.device) -> bool:
    """What `auto` means: bfloat16 on GPUs that have it and on CPUs with matrix units for it, else float32."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX512") and _has_amx()


def _has_amx() -> bool:
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
