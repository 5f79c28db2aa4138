"""What the kernels are compiled with here: compiler, ninja, nvcc, flags, architectures; and the key of all of it.

Nothing here compiles, writes or warns. A missing piece is a BuildError that names it and the remedy.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from packaging.version import Version

FLAGS = ("-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wall")
GCC_NOISE = "-Wno-maybe-uninitialized"  # of gcc 12 about its own header of AVX-512
CUDA_FLAGS = ("-O3", "-std=c++20")


class BuildError(RuntimeError):
    """There are no compiled kernels. The message is one line: what is missing or wrong, and how to mend it."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler."""

    path: str
    version: str
    identity: str  # all it says about itself and about this CPU: the instructions that -march=native stands for
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Nvcc:
    """A CUDA toolkit."""

    home: str
    version: str  # 13.0; 0 where it does not say
    architectures: tuple[int, ...]  # that it compiles for: 90 is Hopper
    has_headers: bool


@dataclass(frozen=True)
class Recipe:
    """What is compiled, with what. Two recipes with the same key make the same library."""

    sources: tuple[str, ...]
    keys: tuple[str, ...]  # the dispatch keys that a good library registers kernels for
    compiler: Compiler
    ninja: str
    flags: tuple[str, ...]
    nvcc: Nvcc | None  # None: for the CPU alone
    cuda_flags: tuple[str, ...]
    missing: str  # what the GPU here lacks to get compiled kernels too, or nothing
    key: str = ""


def recipe(source: Path, with_cuda: bool = True) -> Recipe:
    """How the .cpp files of `source`, and where CUDA is asked for the .cu files too, are compiled here. BuildError."""
    compiler = find_compiler()
    ninja = find_ninja()
    if ninja is None:
        raise BuildError("ninja is missing: pip install ninja")
    nvcc, cuda_flags, missing = cuda() if with_cuda else (None, (), "")
    patterns = ("*.cpp", "*.h", *(("*.cu", "*.cuh") if nvcc else ()))
    files = {path.name: path.read_bytes() for pattern in patterns for path in sorted(source.glob(pattern))}
    sources = tuple(str(source / name) for name in files if name.endswith((".cpp", ".cu")))
    if not sources:
        raise BuildError(f"there are no kernels to compile in {source}: install from a complete checkout")
    registers = any(b"TORCH_LIBRARY_IMPL(gan_ops" in data for data in files.values())
    # OpenMP when compiling, not when linking: the library must use the runtime that torch has loaded. clang's -fopenmp
    # calls another runtime than the one torch ships, so a library of clang's runs on one thread.
    openmp = ("-fopenmp", GCC_NOISE) if "gcc version" in compiler.identity else ()
    flags = (*FLAGS, *compiler.flags, *openmp, *(("-DGAN_OPS_CUDA",) if nvcc else ()))
    keys: tuple[str, ...] = ("CPU", "CUDA") if nvcc else ("CPU",)
    made = Recipe(sources, keys if registers else (), compiler, ninja, flags, nvcc, cuda_flags, missing)
    return replace(made, key=_key(made, files))


def _key(made: Recipe, files: dict[str, bytes]) -> str:
    """A hash of all that decides the library, over whole contents: a home directory may serve many machines."""
    parts = {
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        "flags": [made.flags, made.cuda_flags, os.environ.get("TORCH_CUDA_ARCH_LIST") if made.nvcc else None],
        "torch": [torch.__version__, torch.version.git_version, torch.compiled_with_cxx11_abi(), torch.version.cuda],
        "python": [sys.implementation.cache_tag, platform.machine()],
        "compilers": [made.compiler.identity, asdict(made.nvcc) if made.nvcc else None],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def find_ninja() -> str | None:
    """The path of ninja: on PATH, or beside this Python, where pip puts it whether or not the environment is active."""
    return shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))


def find_compiler() -> Compiler:
    """$CXX, else c++. BuildError if there is none, or none that works."""
    name = os.environ.get("CXX") or "c++"
    path = shutil.which(name)
    if path is None:
        raise BuildError(f"no C++ compiler: {name} not found; install g++ (apt-get install g++) or set CXX to one")
    for flags in (("-march=native",), ()):
        # -v prints the flags that -march=native stands for. clang prints the working directory too.
        command = [os.path.abspath(path), *flags, "-v", "-E", "-x", "c++", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=os.environ | {"LC_ALL": "C"})
        if done.returncode == 0:
            version = re.search(r"^.*(?:gcc|clang) version.*$", done.stderr, re.MULTILINE)
            return Compiler(command[0], version[0].strip() if version else "unknown", done.stderr, flags)
    said = (done.stderr.strip() or "no message").splitlines()[-1]
    raise BuildError(f"no working C++ compiler: {path} fails ({said}); mend it or set CXX to another")


def find_nvcc() -> Nvcc | None:
    """The first in the order of torch.utils.cpp_extension; one without CUDA's headers (a mere link) comes last."""
    on_path = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")]
    homes += [str(Path(on_path).parent.parent) if on_path else None, "/usr/local/cuda"]
    found = [_nvcc(home) for home in homes if home and os.access(Path(home) / "bin" / "nvcc", os.X_OK)]
    return next((nvcc for nvcc in found if nvcc.has_headers), found[0] if found else None)


def _nvcc(home: str) -> Nvcc:
    nvcc = str(Path(home) / "bin" / "nvcc")
    said = [subprocess.run([nvcc, flag], capture_output=True, text=True).stdout for flag in ("-V", "--list-gpu-code")]
    version = re.search(r"release (\d+\.\d+)", said[0])
    headers = [Path(home) / "include" / "cuda_runtime.h", *Path(home).glob("targets/*/include/cuda_runtime.h")]
    known = tuple(sorted({int(arch) for arch in re.findall(r"sm_(\d+)\b", said[1])}))
    return Nvcc(home, version[1] if version else "0", known, any(path.exists() for path in headers))


def cuda() -> tuple[Nvcc | None, tuple[str, ...], str]:
    """-> (toolkit, flags, what is missing). A toolkit: compile for CUDA. Neither: nobody here asks for it.

    It is asked for where torch is built for CUDA and there is a GPU, or TORCH_CUDA_ARCH_LIST says for which one.
    """
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if wanted == "native":  # the GPUs here, as if it were not given
        wanted = None
    gpus = capabilities()
    if torch.version.cuda is None or not (gpus or wanted):
        return None, (), ""
    nvcc = find_nvcc()
    needed = f"CUDA toolkit {torch.version.cuda}"
    if nvcc is None:
        return None, (), f"nvcc is missing: install {needed}, or set CUDA_HOME to where it is"
    if Version(nvcc.version).major != Version(torch.version.cuda).major:
        return None, (), f"nvcc in {nvcc.home} is of CUDA {nvcc.version}, not as PyTorch: install {needed}"
    if not nvcc.has_headers:
        return None, (), f"CUDA's headers are missing in {nvcc.home}: install {needed} with its development files"
    if wanted:
        return nvcc, CUDA_FLAGS, ""  # torch reads the variable, exactly as written
    try:
        return nvcc, (*CUDA_FLAGS, *gencode(architectures(gpus, nvcc.architectures))), ""
    except ValueError as error:
        return None, (), str(error)


def capabilities() -> list[tuple[int, int]]:
    """The compute capability of every GPU that torch sees here, sorted, each once."""
    if torch.version.cuda is None:
        return []
    with warnings.catch_warnings():  # a driver too old for this torch is no GPU, and the doctor says so
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            return []
        try:
            return sorted({torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())})
        except RuntimeError:  # in a forked child of a process that uses a GPU, which may not
            return []


def architectures(gpus: Collection[tuple[int, int]], nvcc: Collection[int]) -> str:
    """The CUDA architectures to compile for, as TORCH_CUDA_ARCH_LIST names them.

    gpus: capabilities, (9, 0) for Hopper. nvcc: what it compiles for, 90 for Hopper. A GPU that nvcc does not know gets
    PTX of the newest architecture before it, which the driver compiles on. ValueError if nvcc is too new for every GPU.
    """
    served = set()
    for major, minor in gpus:
        known = max((arch for arch in nvcc if arch <= 10 * major + minor), default=None)
        if known is not None:
            served.add((known, "" if known == 10 * major + minor else "+PTX"))
    if not served:
        here = ", ".join(f"{major}.{minor}" for major, minor in sorted(gpus))
        raise ValueError(f"this nvcc no longer compiles for the GPUs here ({here}): install an older CUDA toolkit")
    return ";".join(f"{arch // 10}.{arch % 10}{ptx}" for arch, ptx in sorted(served))


def gencode(architectures: str) -> list[str]:
    """The flags of nvcc for "9.0;12.0+PTX". Ours, as torch's own list refuses architectures that nvcc is newer than."""
    flags = []
    for name in architectures.split(";"):
        number, _, ptx = name.replace(".", "").partition("+")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        flags += [f"-gencode=arch=compute_{number},code=compute_{number}"] if ptx else []
    return flags
