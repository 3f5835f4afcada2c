"""Where numbers and pictures go: progress lines, TensorBoard, JSON lines, PNG files. Only process 0 writes."""

import contextlib
import io
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import jax
import numpy as np
import PIL.Image
import rich.console
import rich.progress
import rich.table
import tensorboardX.summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from research import storage
from research.reporting.trackers import Trackers

METRICS = "metrics.jsonl"


class Writer:
    """Appends scalars to metrics.jsonl and to a TensorBoard file.

    Attributes:
      lines: how many lines metrics.jsonl holds.
    """

    def __init__(self, workdir: pathlib.Path, step: int, lines: int = 0, trackers: Trackers | None = None):
        """Open the files of a run that resumes after `step`; what a stopped run wrote after `lines` is dropped."""
        self.lines, self._workdir, self._trackers = 0, workdir, trackers
        self._file: TextIO | None = None
        self._mirror: storage.Mirror | None = None
        if jax.process_index() == 0:
            kept = read_metrics(workdir / METRICS)[:lines]
            self.lines = len(kept)
            local = workdir
            if storage.is_remote(workdir):
                self._mirror = storage.Mirror(workdir)
                local = self._mirror.local
            storage.write(local / METRICS, "".join(json.dumps(row) + "\n" for row in kept).encode())
            self._file = (local / METRICS).open("a", encoding="utf-8")
            # Written in this thread: SummaryWriter's own thread dies where the disk is full, and blocks this one.
            (local / "tensorboard").mkdir(exist_ok=True)
            attempt = len(list((workdir / "tensorboard").glob("*")))  # a file each
            self._board = EventsWriter(str(local / "tensorboard" / "events"), f".{attempt}")
            self.flush()
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # hides the dropped steps
            self._board.write_event(event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, np.ndarray] = {}) -> None:
        """Write one line, in which a NaN or an infinity becomes null, which JSON has, and pictures to figures/."""
        if self._file is not None:
            row = {k: v if math.isfinite(v) else None for k, v in scalars.items()}
            self._file.write(json.dumps({"step": step} | row) + "\n")
            self._file.flush()
            self.lines += 1
            for name, value in scalars.items():
                summary = tensorboardX.summary.scalar(name, value)
                self._board.write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))
            for name, encoded in write_pictures(self._workdir, step, pictures).items():
                picture = summary_pb2.Summary.Image(encoded_image_string=encoded)
                summary = summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=name, image=picture)])
                self._board.write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))
            self._board.flush()
            if self._trackers is not None:
                self._trackers.write(step, {k: v for k, v in row.items() if v is not None}, pictures)
            if self._mirror is not None:
                self._mirror.send(now=False)

    def flush(self) -> None:
        """Return when all that was written is in the run's folder; a checkpoint counts on it."""
        if self._mirror is not None:
            self._mirror.send()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if self._trackers is not None:
            self._trackers.close(error is None)
        if error is not None:
            with contextlib.suppress(Exception):  # what cannot be sent must not hide what stopped the run
                self.flush()

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            self._file.close()
            self._board.close()
        if self._mirror is not None:
            self._mirror.close()


def write_pictures(workdir: pathlib.Path, step: int, pictures: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """Write pictures uint8 [height, width, 3] to figures/NAME-STEP.png, and return the files' contents."""
    contents = {}
    for name, picture in pictures.items():
        buffer = io.BytesIO()
        PIL.Image.fromarray(picture).save(buffer, "png")
        storage.write(workdir / "figures" / f"{name}-{step}.png", buffer.getvalue())
        contents[name] = buffer.getvalue()
    return contents


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl; a last line that was cut off is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().decode("utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class Progress:
    """A live line on a terminal; plain lines elsewhere."""

    def __init__(self, num_steps: int, step: int):
        """Show a run of `num_steps` that stands at `step`."""
        self._console = rich.console.Console(file=sys.stderr, quiet=jax.process_index() != 0, soft_wrap=True)
        self._num_steps, self._first, self._step = num_steps, step, step
        self._numbers = ""
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=24),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[numbers]}"),
            console=self._console,
            disable=not self._console.is_terminal or jax.process_index() != 0,
            transient=True,
        )
        self._task = self._bar.add_task("training", total=num_steps, completed=step, numbers="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def line(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, markup=False, highlight=False)

    @contextlib.contextmanager
    def phase(self, name: str, quiet: bool = False) -> Iterator[None]:
        """Name what is going on while it is not training: compiling, evaluating, saving."""
        start = time.monotonic()
        self._bar.update(self._task, description=name)
        if not self._console.is_terminal and not quiet:
            self.line(f"{name} ...")
        yield
        if not self._console.is_terminal and not quiet:
            self.line(f"{name}: {time.monotonic() - start:.1f} s")
        self._bar.update(self._task, description="training")

    def advance(self, step: int) -> None:
        """Move the live line."""
        self._bar.update(self._task, completed=step)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Show the training metrics of a line of metrics.jsonl and the time left at its speed."""
        speed = scalars.get("train/steps_per_second", 0.0)
        parts = [f"loss {scalars['train/loss']:.4f}", f"{scalars['train/examples_per_second']:.1f} examples/s"]
        if "train/tokens_per_second" in scalars:
            parts.append(f"{scalars['train/tokens_per_second']:,.0f} tokens/s")
        if speed:
            parts.append(f"{duration((self._num_steps - step) / speed)} left")
        numbers = "  ".join(parts)
        self._bar.update(self._task, completed=step, numbers=numbers)
        if not self._console.is_terminal:
            self.line(f"step {step}/{self._num_steps}  {numbers}")

    def table(self, title: str, values: Mapping[str, Any]) -> None:
        """Print a table of results."""
        table = rich.table.Table("", "value", title=title, title_justify="left")
        for name, value in values.items():
            table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
        self._console.print(table)


def duration(seconds: float) -> str:
    """Return "1:02:03" or "2:03"."""
    hours, rest = divmod(int(seconds + 0.5), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
