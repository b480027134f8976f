"""The loop around every training of the codec: rates, averages, log, checkpoints (a module)."""

import hashlib
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from codec_losses import MelDistance
from codec_model import CONFIG, export, forward
from torch import nn

from codec_bridge.atomic import atomic_write
from vampnet_jax.evaluation.distances import MEL_WINDOWS

LOG_EVERY, VALIDATE_EVERY = 50, 500
"""Steps."""
SAVE_EVERY = 180.0
"""Seconds of training between checkpoints."""


def generators(seed: int, step: int, n: int) -> list[np.random.Generator]:
    """Independent ones for what is random in a step, in whatever order threads draw."""
    return [np.random.default_rng(s) for s in np.random.SeedSequence((seed, step)).spawn(n)]


def fingerprint(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 of weights and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def share(replica: nn.Module, module: nn.Module) -> nn.Module:
    """Let `replica` have the parameters of `module`, with gradients of its own.

    Threads that each run whole layers on their part of a batch lose far less, on a machine shared
    with others, than operations that are split between the cores.
    """
    for parameter, own in zip(replica.parameters(), module.parameters(), strict=True):
        parameter.data = own.data
        parameter.requires_grad_(own.requires_grad)
    return replica


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that get gradients."""
    return [p for p in module.parameters() if p.requires_grad]


def update(
    optimizer: torch.optim.Optimizer, replicas: list[nn.Module], limit: float = 20.0
) -> tuple[float, bool]:
    """One step along the mean of the replicas' gradients, clipped to a norm of `limit`.

    A replica without a gradient counts as 0. → the norm before, and whether it was finite: if not,
    nothing is changed.
    """
    first, *others = (trained(replica) for replica in replicas)
    for parameter, *copies in zip(first, *others, strict=True):
        found = [p.grad for p in (parameter, *copies) if p.grad is not None]
        parameter.grad = sum(found) / len(replicas) if found else None
    norm = nn.utils.clip_grad_norm_(first, limit)
    finite = bool(torch.isfinite(norm))
    if finite:
        optimizer.step()
    return float(norm), finite


@torch.no_grad()
def validate(dac: nn.Module, ema: dict, excerpts: torch.Tensor, distance: MelDistance) -> float:
    """Mel distance of the averaged weights on fixed excerpts, in float32."""
    kept = {k: v.clone() for k, v in dac.state_dict().items()}
    dac.load_state_dict(ema)
    every = torch.full((1,), CONFIG["n_codebooks"])
    values = [distance(x, forward(dac, x, every, False)[0]).item() for x in excerpts.split(1)]
    dac.load_state_dict(kept)
    return sum(values) / len(values)


class Run:
    """One training of a codec, over interruptions.

    for step in run.steps(): … does a step; `run.note` what is to be logged.

    Attributes:
      step: how many steps are done.
      spent: seconds of training, over all runs.
    """

    def __init__(
        self,
        out: Path,
        dac: nn.Module,
        optimizer: torch.optim.Optimizer,
        held: torch.Tensor,
        state: Callable[[], dict],
        *,
        minutes: float,
        learning_rate: float,
        steps: float = math.inf,
        begun_from: str = "",
    ):
        """Args:
        out: folder of checkpoint.pt and, at the end, codec.safetensors.
        dac: the codec, whose weights are averaged.
        optimizer: its learning rate rises for 50 steps and falls along a cosine.
        held: validation excerpts [n, 1, samples].
        state: what a checkpoint must hold besides; "model", at least.
        minutes: of training; it ends then or after `steps`, whichever comes first.
        begun_from: fingerprint of the codec that it starts from, if it does.
        """
        self.begun_from = begun_from
        self.out, self.dac, self.optimizer, self.held, self.state = out, dac, optimizer, held, state
        self.seconds, self.most_steps, self.learning_rate = 60 * minutes, steps, learning_rate
        self.ema = {k: v.clone() for k, v in dac.state_dict().items()}
        self.step, self.spent = 0, 0.0
        self.sums, self.counts = Counter[str](), Counter[str]()
        self.distance = MelDistance(MEL_WINDOWS)
        out.mkdir(parents=True, exist_ok=True)

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        if self.spent >= self.seconds or self.step >= self.most_steps:
            return 1.0
        return max(self.step / self.most_steps, self.spent / self.seconds)

    def resume(self) -> dict:
        """Continue from the checkpoint → all that it holds; nothing if there is none.

        Exits if it was begun from another codec.
        """
        if not self.checkpoint.exists():
            return {}
        state = torch.load(self.checkpoint, weights_only=True)
        if state.get("begun_from", self.begun_from) != self.begun_from:
            sys.exit(f"{self.out} holds a training that began from another codec; name a new --out")
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema, self.step, self.spent = state["ema"], state["step"], state["spent"]
        print(f"resumed at step {self.step}, after {self.spent / 60:.1f} minutes", flush=True)
        return state

    def note(self, name: str, value: float) -> None:
        """Log the mean of what is noted under this name."""
        self.sums[name] += value
        self.counts[name] += 1

    def steps(self) -> Iterator[int]:
        """Numbers of the steps to do."""
        saved = self.spent
        while self.progress < 1:
            started = time.monotonic()
            rise, fall = min(1, (self.step + 1) / 50), (1 + math.cos(math.pi * self.progress)) / 2
            for group in self.optimizer.param_groups:
                group["lr"] = max(self.learning_rate * rise * fall, 1e-6)
            yield self.step
            self._average()
            self.step += 1
            self.spent += time.monotonic() - started
            if self.step % LOG_EVERY == 0:
                self._log()
            if self.step % VALIDATE_EVERY == 0:
                print(f"step {self.step} validation mel distance {self.validate():.4f}", flush=True)
            if self.spent - saved > SAVE_EVERY:
                self.save()
                saved = self.spent
        self.save()
        export(self.ema, self.out)
        print(f"finished: validation mel distance {self.validate():.4f}", flush=True)

    def validate(self) -> float:
        return validate(self.dac, self.ema, self.held, self.distance)

    def save(self) -> None:
        """Write the checkpoint."""
        state = {"ema": self.ema, "optimizer": self.optimizer.state_dict(), "config": CONFIG}
        state["begun_from"] = self.begun_from
        with atomic_write(self.checkpoint) as path:
            torch.save(state | {"step": self.step, "spent": self.spent} | self.state(), path)

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(0.998, (1 + self.step) / (20 + self.step))
        for key, value in self.dac.state_dict().items():
            self.ema[key].lerp_(value, 1 - decay)

    def _log(self) -> None:
        means = " ".join(f"{n} {self.sums[n] / self.counts[n]:.3f}" for n in sorted(self.sums))
        print(f"step {self.step} minute {self.spent / 60:.1f} {means}", flush=True)
        self.sums.clear()
        self.counts.clear()
