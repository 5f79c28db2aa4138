"""Frames into an H.264 file, one at a time, by ffmpeg."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import IO

import numpy as np

from gan.errors import UserError


def find_ffmpeg() -> str:
    """The ffmpeg to use: $SADDLE_FFMPEG, else one on PATH, else that of imageio-ffmpeg. UserError if there is none."""
    chosen = os.environ.get("SADDLE_FFMPEG")
    if chosen:
        if not shutil.which(chosen):
            raise UserError(f"SADDLE_FFMPEG={chosen} is not a program; unset it or name an ffmpeg")
        return chosen
    on_path = shutil.which("ffmpeg")
    if on_path:
        return on_path
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        raise UserError("no ffmpeg found: pip install imageio-ffmpeg, or set SADDLE_FFMPEG to an ffmpeg") from None


def command(binary: str, target: Path, width: int, height: int, fps: float) -> list[str]:
    """The ffmpeg command that turns rgb24 frames on standard input into H.264 in yuv420p, which every player takes."""
    import ffmpeg

    frames = ffmpeg.input("pipe:", format="rawvideo", pix_fmt="rgb24", s=f"{width}x{height}", framerate=fps)
    # 4:2:0 needs even sides; colors are converted and tagged as BT.709 because untagged video is guessed by its size.
    even = "pad=ceil(iw/2)*2:ceil(ih/2)*2"
    colors = "scale=out_color_matrix=bt709:out_range=tv,setparams=color_primaries=bt709:color_trc=bt709"
    options = {"vcodec": "libx264", "pix_fmt": "yuv420p", "crf": 18, "movflags": "+faststart", "vf": f"{even},{colors}"}
    # The absolute path can be taken neither for an option (-x.mp4) nor for a protocol (concat:x.mp4).
    stream = ffmpeg.output(frames, str(target.absolute()), **options)
    return ffmpeg.compile(stream.global_args("-loglevel", "error"), cmd=binary, overwrite_output=True)


def write_video(path: Path, frames: Iterable[np.ndarray], fps: float) -> tuple[int, int, int]:
    """Encode frames uint8 [H, W, 3] into `path` (.mp4) -> (frames, width, height), the sides padded to even numbers.

    The file appears when it is complete. UserError, and nothing left behind, for a missing ffmpeg, a folder that cannot
    be written and an encoder that fails.
    """
    if path.suffix != ".mp4":
        raise UserError(f"{path}: a video is written as .mp4; name it {path.stem}.mp4")
    binary = find_ffmpeg()
    frames = iter(frames)
    first = next(frames)
    height, width = first.shape[:2]
    part = path.with_suffix(".part.mp4")
    with replacing(path, part):
        count = encode(command(binary, part, width, height, fps), chain([first], frames), path)
    return count, width + width % 2, height + height % 2


@contextmanager
def replacing(path: Path, part: Path) -> Iterator[None]:
    """The block writes `part`, which then takes its place as `path`, or is removed if anything fails.

    Missing folders are made. UserError says in one line what the system refused.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
    finally:
        with suppress(OSError):
            part.unlink()  # after a success it has been renamed


def encode(arguments: list[str], frames: Iterable[np.ndarray], path: Path) -> int:
    """Run the encoder over all frames -> their number. UserError with the encoder's last words if it fails."""
    # A file, not a pipe, takes its messages: nobody reads a pipe while frames are being written.
    with tempfile.TemporaryFile() as messages:
        try:
            process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stderr=messages)
        except OSError as error:
            raise UserError(f"cannot run {arguments[0]}: {error.strerror}; unset or mend SADDLE_FFMPEG") from error
        try:
            count = feed(process, frames)
            code = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        if code != 0:
            raise UserError(f"cannot write {path}: ffmpeg stopped with code {code}: {last_line(messages)}")
    return count


def feed(process: subprocess.Popen[bytes], frames: Iterable[np.ndarray]) -> int:
    """Write frames to a process until they end or it does -> the number written. Closes its standard input."""
    assert process.stdin
    count = 0
    try:
        for frame in frames:
            process.stdin.write(np.ascontiguousarray(frame).data)
            count += 1
    except BrokenPipeError:
        pass  # its exit code and last words tell more
    finally:
        with suppress(BrokenPipeError):
            process.stdin.close()
    return count


def last_line(messages: IO[bytes]) -> str:
    """The last line that an encoder wrote."""
    messages.seek(0)
    lines = messages.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
