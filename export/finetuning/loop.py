"""The loop of every training: a batch's gradients summed over processes, a checkpoint every few minutes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from edge_rsvlm.errors import InputError
from edge_rsvlm.export.finetuning.recipe import TrainingRecipe

STATE_NAME = "state.pt"
CHECKPOINT_EVERY_S = 180.0
WARMUP = 0.05
"""Share of the run."""
MAX_GRADIENT_NORM = 1.0
LONGEST_WAIT = timedelta(hours=2)
"""Of one process for the others, which may be reading images or writing captions."""

S = TypeVar("S")
Gradients = Callable[[list[S]], Tensor]
"""Adds to the gradients what this process's share of a batch contributes to those of the whole batch's loss.

Returns its contributions to the losses [L], of which the first is the one that is minimised.
"""
Progress = Callable[[int, float, float], None]
"""Called with the step, the share of the run that was done before it, and its loss."""


def silent(step: int, done: float, loss: float) -> None:
    """No progress."""


@dataclass(frozen=True)
class Process:
    """This one of the processes that torchrun started, or the only one."""

    rank: int
    count: int
    device: torch.device

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            dist.barrier()

    def close(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()


def this_process() -> Process:
    rank, count, local = (int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if count > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=LONGEST_WAIT)
    return Process(rank, count, device)


class Loop:
    """AdamW on ``learnt``, with warm-up and half a cosine; a run that was stopped goes on.

    ``digest`` stands for everything that decides how a run goes on: a state of another one is refused.
    """

    def __init__(
        self, recipe: TrainingRecipe, digest: str, learnt: Mapping[str, nn.Parameter], process: Process
    ) -> None:
        self._recipe, self._digest, self._learnt, self._process = recipe, digest, learnt, process
        self._optimizer = torch.optim.AdamW(self._learnt.values(), lr=recipe.rate, weight_decay=0.0)
        self._state_path = recipe.work_folder / STATE_NAME
        self._step, self._used_s, self._losses = 0, 0.0, list[list[float]]()
        self._resume()

    def run(self, samples: Sequence[S], gradients: Gradients[S], progress: Progress) -> list[list[float]]:
        """The losses, step by step."""
        before_s, begun = self._used_s, time.monotonic()
        saved = begun
        while (done := self._done()) < 1:
            self._losses.append(self._update(self._share(samples), gradients, done))
            self._step += 1
            self._used_s = before_s + time.monotonic() - begun
            if time.monotonic() - saved >= CHECKPOINT_EVERY_S:
                self._checkpoint()
                saved = time.monotonic()
            progress(self._step, done, self._losses[-1][0])
        return self._losses

    def _done(self) -> float:
        """The share of the run that is over, the same in every process."""
        if self._recipe.steps is not None:
            return self._step / self._recipe.steps
        assert self._recipe.minutes is not None
        share = torch.tensor(
            [self._used_s / 60 / self._recipe.minutes / self._process.count], device=self._process.device
        )
        return float(self._process.total(share))

    def _share(self, samples: Sequence[S]) -> list[S]:
        """This process's part of the step's batch; every epoch has an order of its own, which the seed fixes."""
        first = self._step * self._recipe.batch
        places = range(first + self._process.rank, first + self._recipe.batch, self._process.count)
        chosen = []
        for place in places:
            generator = torch.Generator().manual_seed(self._recipe.seed + place // len(samples))
            order = torch.randperm(len(samples), generator=generator)
            chosen.append(samples[int(order[place % len(samples)])])
        return chosen

    def _update(self, share: list[S], gradients: Gradients[S], done: float) -> list[float]:
        self._optimizer.zero_grad()
        losses = gradients(share)
        for parameter in self._learnt.values():
            # Layers that the model never reads, such as the last one of LLaVA's tower, have no gradient anywhere.
            gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            parameter.grad = self._process.total(gradient)
        nn.utils.clip_grad_norm_(self._learnt.values(), MAX_GRADIENT_NORM)
        for group in self._optimizer.param_groups:
            group["lr"] = self._recipe.rate * _rate(done)
        self._optimizer.step()
        return [float(loss) for loss in self._process.total(losses)]

    def _checkpoint(self) -> None:
        if self._process.rank:
            return
        state = {
            "recipe": self._digest, "learnt": {name: p.detach() for name, p in self._learnt.items()},
            "optimizer": self._optimizer.state_dict(), "step": self._step, "used_s": self._used_s,
            "losses": self._losses,
        }  # fmt: skip
        self._state_path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._state_path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self._state_path)

    def _resume(self) -> None:
        if not self._state_path.is_file():
            return
        state = torch.load(self._state_path, map_location="cpu", weights_only=True)
        if state["recipe"] != self._digest:
            raise InputError(
                f"{self._state_path.parent} is of a run with another recipe or other data",
                fix="remove that folder to start again, or go back to that recipe",
            )
        with torch.no_grad():
            for name, parameter in self._learnt.items():
                parameter.copy_(state["learnt"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._step, self._used_s, self._losses = state["step"], state["used_s"], state["losses"]


def _rate(done: float) -> float:
    """Warm-up, then half a cosine, as shares of the peak."""
    return min(1.0, (done + 0.01) / WARMUP) * 0.5 * (1 + math.cos(math.pi * done))
