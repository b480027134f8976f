"""What a person sees of a run: a live display, lines, a JSON log and TensorBoard."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from codec_bridge.atomic import atomic_write

LOG = "log.jsonl"


class RunLog:
    """Shows progress and keeps metrics; a context.

    Args:
      run: the run's folder.
      console: where to show.
      first_step: steps already taken; later lines of an interrupted run's log are dropped, since
        these steps come again.
    """

    def __init__(self, run: Path, console: Console, first_step: int) -> None:
        self.console = console
        path = run / LOG
        if path.is_file():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= first_step]
            with atomic_write(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept))
        self._path = path
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:.1f} %"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("compiling", total=1.0)
        self._events = EventFileWriter(str(run / "tensorboard"))
        self._file: IO[str] | None = None

    def __enter__(self) -> "RunLog":
        self._file = open(self._path, "a", encoding="utf-8")
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
        self._events.close()
        if self._file:
            self._file.close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep metrics of one step."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        assert self._file is not None
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        values = [Summary.Value(tag=name, simple_value=value) for name, value in finite.items()]
        self._events.add_event(
            Event(step=step, wall_time=time.time(), summary=Summary(value=values))
        )
        self._events.flush()

    def show(self, step: int, metrics: Mapping[str, float], done: float) -> None:
        """Show training metrics: live on a terminal, else as a line."""
        text = (
            f"step {step}  loss {metrics['loss']:.3f}  "
            f"top-1 {_percent(metrics, 'top1/r<0.5')} | {_percent(metrics, 'top1/r>=0.5')}  "
            f"lr {metrics['learning_rate']:.2e}  {metrics['steps/s']:.2f} steps/s  "
            f"{metrics['tokens/s']:,.0f} tokens/s"
        )
        if self.console.is_terminal:
            self._progress.update(self._task, description=text, completed=done)
        else:
            self.say(f"{100 * done:5.1f} %  {text}")

    def say(self, text: str) -> None:
        """Show one line that stays."""
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _percent(metrics: Mapping[str, float], name: str) -> str:
    value = metrics.get(name, math.nan)
    return "–" if math.isnan(value) else f"{100 * value:.1f} %"


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut off by a crash
