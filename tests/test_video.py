"""launch.video: what is written is decoded again by ffmpeg and compared."""

import stat
import sys

import ffmpeg
import numpy as np
import pytest

from gan.errors import UserError
from launch.video import find_ffmpeg, write_video


def decode(path, width, height):
    """All frames of a video: uint8 [F, H, W, 3]."""
    output = ffmpeg.input(str(path)).output("pipe:", format="rawvideo", pix_fmt="rgb24")
    raw, _ = output.global_args("-loglevel", "error").run(cmd=find_ffmpeg(), capture_stdout=True, capture_stderr=True)
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


def plain(color, height=48, width=64):
    return np.full((height, width, 3), color, np.uint8)


def program(path, text):
    """An executable Python program that stands in for ffmpeg."""
    path.write_text(f"#!{sys.executable}\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


COLORS = [(255, 255, 255), (0, 0, 0), (200, 30, 40), (20, 180, 60), (30, 60, 220), (128, 128, 128)]


def test_frames_come_back_in_number_size_order_and_color(tmp_path):
    path = tmp_path / "new folder" / "colors.mp4"
    assert write_video(path, (plain(color) for color in COLORS for _ in range(5)), fps=30) == (30, 64, 48)
    frames = decode(path, 64, 48)
    assert frames.shape == (30, 48, 64, 3)
    assert np.abs(frames.mean((1, 2)) - np.repeat(COLORS, 5, axis=0)).max() < 4
    assert [p.name for p in path.parent.iterdir()] == ["colors.mp4"]


def test_odd_sides_are_padded_to_even_ones(tmp_path):
    path = tmp_path / "odd.mp4"
    assert write_video(path, [plain((250, 250, 250), 33, 65)] * 3, fps=24) == (3, 66, 34)
    frames = decode(path, 66, 34)
    assert len(frames) == 3
    assert frames[:, :30, :60].mean() > 240


def test_a_name_that_looks_like_an_option_or_a_protocol_is_a_name(tmp_path, monkeypatch):
    from pathlib import Path

    monkeypatch.chdir(tmp_path)
    for name in ("-y.mp4", "concat:a|b.mp4", "with space ' quote.mp4", "%03d.mp4"):
        write_video(Path(name), [plain(0)] * 2, fps=30)
        assert (tmp_path / name).stat().st_size > 500


def test_frames_are_streamed(tmp_path):
    """200 frames of 1.2 MB from a generator: what the encoder has not taken yet is never more than a few of them."""
    alive = peak = 0

    class Counted(np.ndarray):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def frames():
        nonlocal alive, peak
        for index in range(200):
            frame = np.full((480, 852, 3), index, np.uint8).view(Counted)
            alive += 1
            peak = max(peak, alive)
            yield frame

    write_video(tmp_path / "long.mp4", frames(), fps=30)
    assert peak <= 4


def test_an_encoder_that_dies_is_reported_and_leaves_nothing(tmp_path, monkeypatch):
    text = """import sys
(part,) = (argument for argument in sys.argv if argument.endswith('.part.mp4'))
open(part, 'w').write('half a video')
sys.stdin.buffer.read(9)
sys.exit('first line\\nno such encoder')"""
    monkeypatch.setenv("SADDLE_FFMPEG", program(tmp_path / "broken", text))
    out = tmp_path / "out"
    with pytest.raises(UserError, match="ffmpeg stopped with code 1: no such encoder"):
        write_video(out / "x.mp4", (plain(0, 480, 640) for _ in range(50)), fps=30)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(("text", "said"), [("os.kill(os.getpid(), 9)", "was ended by SIGKILL"), ("", "code 1")])
def test_an_encoder_that_is_killed_or_says_nothing_is_one_line(tmp_path, monkeypatch, text, said):
    program_text = f"import os, sys\nsys.stdin.buffer.read(9)\n{text}\nsys.exit(1)"
    monkeypatch.setenv("SADDLE_FFMPEG", program(tmp_path / "killed", program_text))
    with pytest.raises(UserError, match=f"ffmpeg {'' if text else 'stopped with '}{said}: it printed nothing$"):
        write_video(tmp_path / "out" / "x.mp4", (plain(0, 480, 640) for _ in range(50)), fps=30)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_old_video_survives_a_failure(tmp_path, monkeypatch):
    path = tmp_path / "x.mp4"
    path.write_bytes(b"old")

    def frames():
        yield plain(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(path, frames(), fps=30)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.mp4"]


def test_a_missing_ffmpeg_is_an_error_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("SADDLE_FFMPEG", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="SADDLE_FFMPEG"):
        write_video(tmp_path / "x.mp4", [plain(0)], fps=30)
    (tmp_path / "text").write_text("no program")
    (tmp_path / "text").chmod(0o755)
    monkeypatch.setenv("SADDLE_FFMPEG", str(tmp_path / "text"))
    with pytest.raises(UserError, match="cannot run"):
        write_video(tmp_path / "x.mp4", [plain(0)], fps=30)
    monkeypatch.delenv("SADDLE_FFMPEG")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(UserError, match="pip install imageio-ffmpeg"):
        write_video(tmp_path / "x.mp4", [plain(0)], fps=30)
    assert [p.name for p in tmp_path.iterdir()] == ["text"]


def test_ffmpeg_is_looked_for_in_order(tmp_path, monkeypatch):
    chosen, on_path = program(tmp_path / "mine", ""), program(tmp_path / "ffmpeg", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SADDLE_FFMPEG", chosen)
    assert find_ffmpeg() == chosen
    monkeypatch.delenv("SADDLE_FFMPEG")
    assert find_ffmpeg() == on_path


@pytest.mark.parametrize("name", ["x.avi", "x"])
def test_other_suffixes_are_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"x\.mp4"):
        write_video(tmp_path / name, [plain(0)], fps=30)


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_video(tmp_path / "file" / "x.mp4", [plain(0)], fps=30)
