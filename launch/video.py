"""Writing frames to an H.264 file by ffmpeg, one frame at a time."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from gan.errors import UserError
from launch.outputs import output_file


def find_ffmpeg() -> str:
    """The ffmpeg to use: $SADDLE_FFMPEG, else one on PATH, else that of imageio-ffmpeg. UserError if there is none."""
    chosen = os.environ.get("SADDLE_FFMPEG")
    if chosen:
        if not shutil.which(chosen):
            raise UserError(f"SADDLE_FFMPEG={chosen} is not a program; unset it, or set it to an ffmpeg")
        return chosen
    on_path = shutil.which("ffmpeg")
    if on_path:
        return on_path
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        raise UserError("no ffmpeg found: pip install imageio-ffmpeg, or set SADDLE_FFMPEG to an ffmpeg") from None


def encoding(target: Path, width: int, height: int, fps: float) -> Any:
    """The ffmpeg stream that turns rgb24 frames on standard input into H.264 in yuv420p, which all players can play."""
    import ffmpeg

    frames = ffmpeg.input("pipe:", format="rawvideo", pix_fmt="rgb24", s=f"{width}x{height}", framerate=fps)
    # 4:2:0 needs even sides. Colors are converted to BT.709 and tagged, as players guess them in untagged video.
    even = "pad=ceil(iw/2)*2:ceil(ih/2)*2"
    colors = "scale=out_color_matrix=bt709:out_range=tv,setparams=color_primaries=bt709:color_trc=bt709"
    options = {"vcodec": "libx264", "pix_fmt": "yuv420p", "crf": 18, "movflags": "+faststart", "vf": f"{even},{colors}"}
    # ffmpeg could take a relative path for an option (-x.mp4) or for a protocol (concat:x.mp4).
    return ffmpeg.output(frames, str(target.absolute()), **options).global_args("-loglevel", "error")


def write_video(path: Path, frames: Iterable[np.ndarray], fps: float) -> tuple[int, int, int]:
    """Encode frames uint8 [H, W, 3] into `path` (.mp4). -> (frames, width, height), the sides padded to even numbers.

    The file appears when it is complete. Raises UserError, and leaves nothing behind, if ffmpeg is missing or fails, or
    the folder cannot be written.
    """
    if path.suffix != ".mp4":
        raise UserError(f"{path}: a video is written as .mp4; name it {path.stem}.mp4")
    binary = find_ffmpeg()
    frames = iter(frames)
    first = next(frames)
    height, width = first.shape[:2]
    with output_file(path) as part:
        process = start(encoding(part, width, height, fps), binary)
        try:
            count = feed(process, chain([first], frames))
            _, messages = process.communicate()
        except BaseException:
            process.kill()
            process.communicate()
            raise
        if process.returncode != 0:
            raise UserError(f"cannot write {path}: {how_it_ended(process.returncode, messages)}")
    return count, width + width % 2, height + height % 2


def start(stream: Any, binary: str) -> subprocess.Popen[bytes]:
    """Start ffmpeg, reading frames from a pipe. Raises UserError if `binary` does not run here.

    Its messages are read after all frames are written: at log level `error` they are few and fit into the pipe.
    """
    import ffmpeg

    try:
        return ffmpeg.run_async(stream, cmd=binary, pipe_stdin=True, pipe_stderr=True, overwrite_output=True)
    except OSError as error:
        raise UserError(f"cannot run {binary}: {error.strerror}; unset or mend SADDLE_FFMPEG") from error


def feed(process: subprocess.Popen[bytes], frames: Iterable[np.ndarray]) -> int:
    """Write frames to a process until either ends. -> the number of frames written."""
    assert process.stdin
    count = 0
    with suppress(BrokenPipeError):  # ffmpeg has ended; its exit code and messages say why
        for frame in frames:
            process.stdin.write(np.ascontiguousarray(frame).data)
            count += 1
    return count


def how_it_ended(code: int, messages: bytes) -> str:
    """The exit code of an ffmpeg that failed, in words, with the last line that it wrote."""
    lines = messages.decode(errors="replace").strip().splitlines()
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"stopped with code {code}"
    return f"ffmpeg {how}: {lines[-1] if lines else 'it printed nothing'}"
