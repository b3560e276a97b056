"""Where networks run."""

import torch


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
