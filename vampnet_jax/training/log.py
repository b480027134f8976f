"""What a person sees of a run: a live display, lines, a JSON log and TensorBoard."""

import contextlib
import io
import json
import math
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from codec_bridge.atomic import atomic_write
from vampnet_jax.training.faults import writing

LOG = "log.jsonl"


class RunLog:
    """Shows progress and keeps metrics; a context.

    Args:
      run: the run's folder.
      console: where to show.
      first_step: steps already taken; what an interrupted run logged after it is dropped, since
        these steps come again.
      quiet: show and keep nothing: for all processes but one.
    """

    def __init__(self, run: Path, console: Console, first_step: int, *, quiet: bool = False):
        self.console = console
        self.quiet = quiet
        self._run = run
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:.1f} %"),
            TimeElapsedColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self._task = self._progress.add_task("compiling", total=1.0)
        self._file: IO[str] | None = None
        self._events: EventFileWriter | None = None
        if quiet:
            return
        path = run / LOG
        with writing(run):
            if path.is_file():
                kept = [line for line in path.read_text().splitlines() if _step(line) <= first_step]
                with atomic_write(path) as temporary:
                    temporary.write_text("".join(line + "\n" for line in kept))
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed on exit)
            self._events = EventFileWriter(str(run / "tensorboard"))
            if first_step:  # TensorBoard then drops what it has of later steps
                started = SessionLog(status=SessionLog.START)
                self._events.add_event(
                    Event(step=first_step + 1, wall_time=time.time(), session_log=started)
                )

    def __enter__(self) -> "RunLog":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
        # An error that ends the run comes before one of closing the log.
        with contextlib.suppress(*([Exception] if error else [])), writing(self._run):
            if self._events:
                self._events.close()
            if self._file:
                self._file.close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep metrics of one step.

        Raises:
          InputError: the run's folder cannot be written to.
        """
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if self._file is not None:
            with writing(self._run):
                self._file.write(json.dumps({"step": step, **finite}) + "\n")
                self._file.flush()
        self._add(
            step, [Summary.Value(tag=name, simple_value=value) for name, value in finite.items()]
        )

    def write_text(self, name: str, text: str) -> None:
        """Keep a text (Markdown) with TensorBoard."""
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        tensor = TensorProto(
            dtype=DT_STRING, string_val=[text.encode()], tensor_shape=TensorShapeProto()
        )
        self._add(0, [Summary.Value(tag=name, metadata=metadata, tensor=tensor)])

    def write_audio(self, step: int, name: str, audio: np.ndarray, sample_rate: int) -> None:
        """Keep a sound with TensorBoard: float `[samples]`, within ±1."""
        import soundfile

        file = io.BytesIO()
        soundfile.write(file, audio, sample_rate, format="WAV", subtype="PCM_16")
        sound = Summary.Audio(
            sample_rate=sample_rate,
            num_channels=1,
            length_frames=len(audio),
            encoded_audio_string=file.getvalue(),
            content_type="audio/wav",
        )
        self._add(step, [Summary.Value(tag=name, audio=sound)])

    def write_picture(self, step: int, name: str, png: bytes) -> None:
        """Keep a picture with TensorBoard."""
        width, height = struct.unpack(">II", png[16:24])  # the header that every PNG begins with
        picture = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
        self._add(step, [Summary.Value(tag=name, image=picture)])

    def _add(self, step: int, values: list[Summary.Value]) -> None:
        if self._events is None:
            return
        with writing(self._run):
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
            f"{metrics['tokens/s']:,.0f} tokens/s  MFU {_percent(metrics, 'MFU')}"
        )
        if self.console.is_terminal:
            self._progress.update(self._task, description=text, completed=done)
        else:
            self.say(f"{100 * done:5.1f} %  {text}")

    def say(self, text: str) -> None:
        """Show one line that stays."""
        if self.quiet:
            return
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _percent(metrics: Mapping[str, float], name: str) -> str:
    value = metrics.get(name, math.nan)
    return "–" if math.isnan(value) else f"{100 * value:.1f} %"


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut off by a crash
