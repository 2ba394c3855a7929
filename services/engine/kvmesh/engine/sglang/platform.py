"""SGLang on a plain CPU, by SGLang's own extension point for platforms.

SGLang's CPU engine proper (`SGLANG_USE_CPU_ENGINE=1`) needs kernels that no registry has; this
platform runs its torch code instead. SGLang loads it by entry point in each of its processes.
"""

from __future__ import annotations

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


class CpuPlatform(CpuDeviceMixin, SRTPlatform):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Torch on the host; nothing that needs a device kernel."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def is_pin_memory_available(self, device: torch.device | None = None) -> bool:
        return False


def activate() -> str | None:
    """The platform's class where there is no CUDA device; None leaves SGLang to its own choice."""
    return None if torch.cuda.is_available() else f"{__name__}.CpuPlatform"
