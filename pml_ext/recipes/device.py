"""Where networks run."""

import platform
import warnings

import torch

X86 = ("x86_64", "AMD64")


def usable_device(device: torch.device | str | None = None) -> torch.device:
    """Return a device: CUDA if there is any, else the CPU, unless another is given.

    Raises:
        ValueError: If it is not there, or holds no data ("meta").
    """
    try:
        chosen = (
            torch.device("cuda" if torch.cuda.is_available() else "cpu") if device is None else torch.device(device)
        )
        torch.empty(1, device=chosen)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device must be available, got {device!r}: {error}") from error
    if chosen.type == "meta":
        raise ValueError(f"device must hold data, got {device!r}")
    return chosen


def warn_of_slow_autocast(device: torch.device, autocast: torch.dtype | None) -> None:
    """Warn where a network is far slower in ``autocast`` than in float32: on x86 processors without AVX-512."""
    if autocast is None or device.type != "cpu" or platform.machine() not in X86:
        return
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        name = str(autocast).removeprefix("torch.")
        message = f"autocast to {name} may be many times slower than float32 on this processor, which has no AVX-512"
        warnings.warn(message, UserWarning, stacklevel=1)  # of this line, whoever calls
