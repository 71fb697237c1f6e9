"""Limits how far the host runs ahead of the GPU, and checks that the device still responds."""

from collections import deque

import torch


class RunAhead:
    """Keeps the host at most one step ahead, so that a cancellation or an admission waits for one step at most."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._steps_under_way: deque[torch.cuda.Event] = deque()

    def limit(self) -> None:
        """Waits for the step before the one just launched. Does nothing on a CPU."""
        if self._device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._steps_under_way.append(event)
        if len(self._steps_under_way) > 1:
            self._steps_under_way.popleft().synchronize()


def device_works(device: torch.device) -> bool:
    """Returns whether the device still computes: a failed kernel makes a CUDA context unusable for good."""
    try:
        return float(torch.ones(1, device=device).sum()) == 1.0
    except Exception:
        return False  # any error counts; the caller logs why the step failed
