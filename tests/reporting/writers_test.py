import json
import math

import numpy as np
import PIL.Image
import pytest
from tensorboardX.proto import event_pb2

from research.reporting.writers import METRICS, Progress, Writer, duration, read_metrics


def write(workdir, steps, lines=0) -> int:
    writer = Writer(workdir, steps[0] - 1, lines)
    for step in steps:
        writer.write(step, {"train/loss": step / 2})
    writer.close()
    return writer.lines


def events(workdir) -> list[event_pb2.Event]:
    """Reads TensorBoard's files: length, its checksum, an event, its checksum, and so on."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_lines_are_json_and_not_finite_is_null(tmp_path):
    writer = Writer(tmp_path, 0)
    writer.write(5, {"train/loss": 0.25, "train/ratio": math.nan, "train/norm": math.inf})
    assert (
        tmp_path / METRICS
    ).read_text() == '{"step": 5, "train/loss": 0.25, "train/ratio": null, "train/norm": null}\n'
    assert writer.lines == 1
    writer.close()


def test_going_on_drops_what_was_written_after_the_checkpoint(tmp_path):
    assert write(tmp_path, [5, 10, 15]) == 3
    assert write(tmp_path, [10, 15, 20], lines=1) == 4
    assert [row["step"] for row in read_metrics(tmp_path / METRICS)] == [5, 10, 15, 20]


def test_a_second_line_of_the_checkpoints_own_step_is_dropped_too(tmp_path):
    """A run stopped in the evaluation at step 10 goes on from step 10 and evaluates again."""
    writer = Writer(tmp_path, 0)
    writer.write(10, {"train/loss": 1.0})
    kept = writer.lines
    writer.write(10, {"test/loss": 2.0})
    writer.close()
    Writer(tmp_path, 10, kept).close()
    assert read_metrics(tmp_path / METRICS) == [{"step": 10, "train/loss": 1.0}]


@pytest.mark.parametrize("tail", [b'{"step": 15, "tra', b"\x00\x00\x00", b"\xff\xfe", b'{"step": 15}\n{"st'])
def test_a_line_that_was_cut_off_is_dropped(tail, tmp_path):
    write(tmp_path, [5, 10])
    with (tmp_path / METRICS).open("ab") as file:
        file.write(tail)
    assert write(tmp_path, [15], lines=2) == 3
    assert (tmp_path / METRICS).read_text().splitlines()[2] == json.dumps({"step": 15, "train/loss": 7.5})


def test_fewer_lines_than_the_checkpoint_knows_are_kept_as_they_are(tmp_path):
    write(tmp_path, [5])
    assert write(tmp_path, [30], lines=6) == 2


def test_no_file_has_no_metrics(tmp_path):
    assert read_metrics(tmp_path / METRICS) == []


def test_tensorboard_holds_the_scalars_and_where_a_run_went_on(tmp_path):
    write(tmp_path, [5, 10])
    write(tmp_path, [10], lines=1)
    found = events(tmp_path)
    scalars = [(e.step, e.summary.value[0].tag, e.summary.value[0].simple_value) for e in found if e.summary.value]
    assert sorted(scalars) == [(5, "train/loss", 2.5), (10, "train/loss", 5.0), (10, "train/loss", 5.0)]
    assert sorted(e.step for e in found if e.session_log.status == event_pb2.SessionLog.START) == [5, 10]


def test_plain_lines_where_there_is_no_terminal(capsys):
    progress = Progress(100, 0)
    with progress, progress.phase("compiling"):
        pass
    scalars = {"train/loss": 0.5, "train/examples_per_second": 32.0, "train/steps_per_second": 2.0}
    progress.log(20, scalars | {"train/tokens_per_second": 4096.0})
    progress.table("run", {"test/accuracy": 0.75, "step": 100})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "compiling ..."
    assert lines[1].startswith("compiling: 0.0 s")
    assert lines[2] == "step 20/100  loss 0.5000  32.0 examples/s  4,096 tokens/s  0:40 left"
    assert any("test/accuracy" in line and "0.7500" in line for line in lines)


def test_duration():
    assert [duration(s) for s in (0, 59.6, 125, 3723)] == ["0:00", "1:00", "2:05", "1:02:03"]


def test_pictures_go_to_a_file_a_step_and_to_tensorboard(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    writer = Writer(tmp_path, 0)
    writer.write(10, {"samples/distance": 2.0}, {"samples/grid": picture})
    writer.close()
    path = tmp_path / "figures" / "samples" / "grid-10.png"
    assert (np.asarray(PIL.Image.open(path)) == picture).all()
    shown = [event for event in events(tmp_path) if event.summary.value and event.summary.value[0].HasField("image")]
    assert [(event.step, event.summary.value[0].tag) for event in shown] == [(10, "samples/grid")]
    assert shown[0].summary.value[0].image.encoded_image_string == path.read_bytes()
    assert json.loads((tmp_path / METRICS).read_text()) == {"step": 10, "samples/distance": 2.0}
