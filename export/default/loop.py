"""A training loop bounded by time: learning rates follow the share of it that was used, checkpoints let it resume."""

from __future__ import annotations

import json
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
WARMUP_STEPS = 100
CHECKPOINT_EVERY_S = 180
REPORT_EVERY_S = 20
MAX_GRADIENT_NORM = 5.0


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Averaged:
    """Exponential moving average of a module's floating tensors (Polyak averaging)."""

    def __init__(self, module: nn.Module, decay: float = 0.998) -> None:
        self._module, self._decay, self._steps = module, decay, 0
        self.state = {k: v.detach().clone() for k, v in module.state_dict().items()}

    def update(self) -> None:
        self._steps += 1
        decay = min(self._decay, self._steps / (self._steps + 10))
        for name, value in self._module.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value.detach(), 1 - decay)
            else:
                self.state[name].copy_(value)


def rate(progress: float, step: int, warmup: int = WARMUP_STEPS) -> float:
    """Warm-up by steps, then half a cosine over the time budget, down to 2 %."""
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def ahead(make: Callable[[], T], depth: int = 6) -> Iterator[T]:
    """Endless samples made by one background thread."""
    waiting: queue.Queue[T] = queue.Queue(depth)

    def produce() -> None:
        while True:
            waiting.put(make())

    threading.Thread(target=produce, daemon=True).start()
    while True:
        yield waiting.get()


def train(
    module: nn.Module,
    groups: list[dict[str, Any]],
    step_loss: Callable[[float], dict[str, Tensor]],
    *,
    minutes: float,
    checkpoint: Path,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Minimise the sum of ``step_loss(progress)``, which is told the share of the time that is gone, for ``minutes``;
    returns averaged weights and what was seen.

    ``groups`` are AdamW parameter groups, each with its own ``lr`` and, where it is not WARMUP_STEPS, ``warmup``.
    Losses go to a ``.jsonl`` beside ``checkpoint``.
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.98))
    peak_rates = [g["lr"] for g in optimizer.param_groups]
    average = Averaged(module)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    step, used_s = _resume(checkpoint, module, optimizer, average)
    begun = reported = saved = time.monotonic()
    seen: dict[str, float] = {}
    while (spent := used_s + time.monotonic() - begun) < minutes * 60:
        for group, peak in zip(optimizer.param_groups, peak_rates, strict=True):
            group["lr"] = peak * rate(spent / (minutes * 60), step, group.get("warmup", WARMUP_STEPS))
        losses = step_loss(spent / (minutes * 60))
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(module.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        average.update()
        step += 1
        for name, loss in losses.items():
            value = loss.detach().item()
            seen[name] = seen.get(name, value) * 0.98 + value * 0.02
        if time.monotonic() - reported > REPORT_EVERY_S:
            reported = time.monotonic()
            _report(checkpoint.with_suffix(".jsonl"), spent / 60, minutes, step, seen)
        if time.monotonic() - saved > CHECKPOINT_EVERY_S:
            saved = time.monotonic()
            _save(checkpoint, module, optimizer, average, step, used_s + saved - begun)
    _save(checkpoint, module, optimizer, average, step, minutes * 60)
    return average.state, {"steps": float(step), **{f"loss_{k}": round(v, 4) for k, v in seen.items()}}


def _report(log: Path, spent: float, minutes: float, step: int, seen: dict[str, float]) -> None:
    """A line to read, and one to plot: losses are running means."""
    text = " ".join(f"{k} {v:.3f}" for k, v in seen.items())
    print(f"{spent:6.1f} of {minutes:g} min, step {step}: {text}", flush=True)
    with log.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"minutes": round(spent, 2), "step": step, **seen}) + "\n")


def _save(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, average: Averaged, step: int, used_s: float
) -> None:
    state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "average": average.state}
    temporary = path.with_suffix(".tmp")
    torch.save({**state, "step": step, "used_s": used_s}, temporary)
    temporary.replace(path)


def _resume(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, average: Averaged) -> tuple[int, float]:
    if not path.is_file():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    average.state = state["average"]
    print(f"resumed at step {state['step']}", flush=True)
    return int(state["step"]), float(state["used_s"])
