"""`saddle doctor`: what works on this machine, what is missing, and how to mend it."""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from launch.cli import run

ROOT = Path(__file__).resolve().parent.parent
OK, NOTE, MISSING, BROKEN = "ok", "note", "missing", "broken"


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    name: str
    state: str  # OK; NOTE: works, and could be better; MISSING; BROKEN
    found: str
    remedy: str = ""
    needed: bool = False  # without it nothing trains


@click.command()
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the rows here too.")
def main(json_path: Path | None) -> int:
    """Show what works on this machine and what is missing, with the remedy. Exits 2 if training cannot run."""
    findings = examine()
    for line in table(findings):
        click.echo(line)
    stops = [finding.name for finding in findings if finding.needed and finding.state in (MISSING, BROKEN)]
    click.echo(f"training cannot run: mend {', '.join(stops)}" if stops else "training can run")
    if json_path:
        from launch.tables import write_json

        write_json(json_path, {"works": not stops, "findings": [asdict(finding) for finding in findings]})
        click.echo(f"wrote {json_path}")
    return 2 if stops else 0


def examine() -> list[Finding]:
    """Every probe of PROBES. One that fails is a finding itself: the doctor must not fall ill."""
    findings: list[Finding] = []
    for name, (probe, needed) in PROBES.items():
        try:
            findings += probe()
        except Exception as error:  # whatever is broken on this machine
            text = f"{type(error).__name__}: {error}"
            findings.append(Finding(name, BROKEN, text, "./run setup installs what is needed again", needed))
    return findings


def table(findings: list[Finding]) -> Iterator[str]:
    """Lines for people: state, name, what was found; the remedy below it."""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        yield f"{finding.state:7}  {finding.name:{width}}  {' '.join(finding.found.split())}"
        if finding.remedy:
            yield f"{'':7}  {'':{width}}  -> {finding.remedy}"


def _python() -> Iterator[Finding]:
    text = f"{platform.python_version()}, {platform.platform()}"
    good = sys.version_info >= (3, 11)
    yield Finding("python", OK if good else BROKEN, text, "" if good else "install Python 3.11 or newer", needed=True)


def _torch() -> Iterator[Finding]:
    import torch

    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU alone"
    yield Finding(
        "PyTorch", OK, f"{torch.__version__}, {built}, CPU: {torch.backends.cpu.get_cpu_capability()}", needed=True
    )


def _packages() -> Iterator[Finding]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"]:
        yield _package(requirement, "")
    for extra, requirements in project["optional-dependencies"].items():
        for requirement in requirements:
            yield _package(requirement, extra)


def _package(requirement: str, extra: str) -> Finding:
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    name = wanted.name
    install = f"pip install '{requirement}'"
    label = f"{name} [{extra}]" if extra else name
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(label, NOTE if extra else MISSING, "not installed", install, needed=not extra)
    if not wanted.specifier.contains(version, prereleases=True):
        return Finding(label, NOTE if extra else BROKEN, f"{version}, and {requirement} is needed", install, not extra)
    return Finding(label, OK, version, needed=not extra)


def _compiler() -> Iterator[Finding]:
    from ops.toolchain import BuildError, find_compiler

    try:
        compiler = find_compiler()
        yield Finding(
            "C++ compiler", OK, f"{compiler.path}, {compiler.version}, {' '.join(compiler.flags) or 'portable'}"
        )
    except BuildError as error:
        yield Finding("C++ compiler", MISSING, str(error), "apt-get install g++; until then the reference kernels run")


def _ninja() -> Iterator[Finding]:
    from ops.toolchain import find_ninja

    path = find_ninja()
    yield Finding("ninja", OK if path else MISSING, path or "not found", "" if path else "pip install ninja")


def _nvcc() -> Iterator[Finding]:
    from ops.toolchain import cuda, find_nvcc

    nvcc, missing = find_nvcc(), cuda()[2]
    found = f"CUDA {nvcc.version} in {nvcc.home}" if nvcc else "not found"
    if missing:
        yield Finding("nvcc", BROKEN if nvcc else MISSING, found, f"{missing}; until then the GPU runs the reference")
    else:
        yield Finding("nvcc", OK if nvcc else NOTE, found if nvcc else f"{found}, and not needed here")


def _gpus() -> Iterator[Finding]:
    import torch

    from ops.toolchain import architectures, capabilities, find_nvcc

    if not capabilities():
        why = (
            "torch is built for the CPU alone" if torch.version.cuda is None else "torch sees none (driver? container?)"
        )
        yield Finding("GPU", NOTE, f"none: {why}")
        return
    nvcc = find_nvcc()
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        text = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, capability {about.major}.{about.minor}"
        try:
            ptx = nvcc and "PTX" in architectures([(about.major, about.minor)], nvcc.architectures)
            text += ", newer than nvcc: compiled by its driver" if ptx else ""
            yield Finding(f"GPU {index}", OK, text)
        except ValueError as error:
            yield Finding(f"GPU {index}", NOTE, text, str(error))


def _kernels() -> Iterator[Finding]:
    from ops.build import cache
    from ops.choice import status
    from ops.toolchain import BuildError

    try:
        now = status()
    except BuildError as error:
        yield Finding("SADDLE_OPS", BROKEN, str(error), "unset SADDLE_OPS", needed=True)
        return
    where = f"compiled: {now.library}" if now.library else f"not compiled yet, key {now.key}" if now.key else "none"
    yield Finding("compiled kernels", OK if now.library else NOTE, where, "" if now.library else "python -m ops.build")
    broken = now.mode == "compiled" and bool(now.missing)
    state = BROKEN if broken else OK if not now.missing else NOTE
    yield Finding("SADDLE_OPS", state, f"{now.mode}: the {now.kernels} kernels", now.missing, needed=broken)
    existing = next(path for path in (cache(), *cache().parents) if path.exists())
    free, writable = shutil.disk_usage(existing).free, os.access(existing, os.W_OK)
    good = writable and free > 100 * 2**20
    text = f"{cache()}, {free / 2**30:.1f} GiB free" + ("" if writable else ", cannot be written")
    yield Finding("kernel cache", OK if good else BROKEN, text, "" if good else "set SADDLE_CACHE to another directory")


def _threads() -> Iterator[Finding]:
    import torch

    from gan.ranks.distributed import cores

    text = f"{torch.get_num_threads()} threads of torch, {cores()} cores for this process of {os.cpu_count()}"
    limit = os.environ.get("OMP_NUM_THREADS")
    yield Finding("threads", OK, text + (f", OMP_NUM_THREADS={limit}" if limit else ""))
    runtimes = openmp_runtimes()
    two = "two runtimes wait for each other's threads: remove what loads the second (LD_PRELOAD? another library?)"
    yield Finding("OpenMP", OK if len(runtimes) < 2 else NOTE, ", ".join(runtimes) or "none", two * (len(runtimes) > 1))


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes loaded into this process, as far as the system tells (Linux)."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if re.search(r"lib(gomp|omp|iomp5)[^/]*\.so", path))


def _memory() -> Iterator[Finding]:
    from ops.memory import is_glibc

    settings = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(("MALLOC_", "GLIBC_TUN"))]
    preloaded = os.environ.get("LD_PRELOAD")
    settings += [f"LD_PRELOAD={preloaded}"] if preloaded else []
    library = (
        f"glibc {platform.libc_ver()[1]}, pages of freed tensors are kept" if is_glibc() else "not glibc: as it is"
    )
    yield Finding("malloc", OK if is_glibc() else NOTE, ", ".join([library, *settings]))


def _ffmpeg() -> Iterator[Finding]:
    from gan.errors import UserError
    from launch.video import find_ffmpeg

    try:
        yield Finding("ffmpeg", OK, find_ffmpeg())
    except UserError as error:
        yield Finding("ffmpeg", NOTE, "not found: no videos", str(error))


PROBES: dict[str, tuple[Callable[[], Any], bool]] = {  # what to look at, and whether nothing trains without it
    "python": (_python, True),
    "PyTorch": (_torch, True),
    "packages": (_packages, False),
    "C++ compiler": (_compiler, False),
    "ninja": (_ninja, False),
    "nvcc": (_nvcc, False),
    "GPU": (_gpus, False),
    "compiled kernels": (_kernels, False),
    "threads": (_threads, False),
    "malloc": (_memory, False),
    "ffmpeg": (_ffmpeg, False),
}


if __name__ == "__main__":
    run(main, "saddle doctor")
