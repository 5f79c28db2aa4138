"""saddle benchmark ops: contestants do the same work, bytes are those counted by hand, the table is what was measured.

No test here asserts a speed.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from devices import DEVICES

from launch import cli
from launch.benchmark import find_benchmarks, ops_benchmark, timing
from launch.benchmark.op_contestants import ALONE, DTYPES, LAYOUTS, OPS, PASSES, bytes_moved, make_tensors
from launch.benchmark.op_figures import COLUMNS, OpTimes, figures_of, in_short, summarize_classes
from launch.benchmark.timing import Sampling, Times, contest, fastest

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
CASES = [(op, case) for op in OPS for case in OPS[op].cases]
MEGABYTES = [  # of the forward and of the backward alone, in fp32 and in bf16: each tensor once, a bit per element
    ("upfirdn2d", "up2", (8, 64, 64, 64), (41.9, 41.9), (21.0, 21.0)),
    ("upfirdn2d", "down2", (8, 64, 64, 64), (10.5, 10.5), (5.2, 5.2)),
    ("upfirdn2d", "blur", (8, 64, 64, 64), (16.8, 16.8), (8.4, 8.4)),
    ("upfirdn2d", "up2", (16, 256, 16, 16), (21.0, 21.0), (10.5, 10.5)),
    ("upfirdn2d", "up2", (32, 128, 256, 256), (5368.7, 5368.7), (2684.4, 2684.4)),
    ("upfirdn2d", "down2", (32, 512, 64, 64), (335.5, 335.5), (167.8, 167.8)),
    ("bias_leaky_relu", "", (8, 64, 64, 64), (16.8, 17.0), (8.4, 8.7)),
    ("bias_leaky_relu", "", (32, 512, 64, 64), (536.9, 545.3), (268.4, 276.8)),
    ("bias_leaky_relu", "", (32, 128, 256, 256), (2147.5, 2181.0), (1073.7, 1107.3)),
    ("gradient_penalty", "", (64, 3, 64, 64), (3.1, 6.3), (1.6, 3.1)),
    ("gradient_penalty", "", (16, 3, 1024, 1024), (201.3, 402.7), (100.7, 201.3)),
    ("interpolate_samples", "", (64, 3, 64, 64), (9.4, 6.3), (4.7, 3.1)),
    ("conv2d", "to image", (32, 64, 256, 256), (562.0, 1124.1), (281.0, 562.0)),  # two kernels for the gradients
    ("conv2d", "from image", (32, 64, 256, 256), (562.0, 1124.1), (281.0, 562.0)),
]


@pytest.fixture(autouse=True)
def same_threads_after():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("op", "case", "shape", "fp32", "bf16"), MEGABYTES)
def test_bytes_are_those_counted_by_hand(op, case, shape, fp32, bf16):
    for name, wanted in (("fp32", fp32), ("bf16", bf16)):
        one = OPS[op].contest(case, shape, DTYPES[name], CPU)
        forward = bytes_moved(one, DTYPES[name], "forward")
        both = bytes_moved(one, DTYPES[name], "forward+backward")
        assert both[: len(forward)] == forward
        assert (round(sum(forward) / 1e6, 1), round(sum(both[len(forward) :]) / 1e6, 1)) == wanted
        double = bytes_moved(one, DTYPES[name], "double backward")
        assert sum(double) > sum(both)
        assert [moved for passes in ALONE for moved in bytes_moved(one, DTYPES[name], passes)] == double


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_contestants_do_the_same_work(op, case, layout):
    """Every variant, in every pass, on the same numbers: what is compared in time must be equal in value."""
    torch.manual_seed(1)
    shape, dtype = (2, 3, 8, 12), torch.float64
    one = OPS[op].contest(case, shape, dtype, CPU)
    on = make_tensors(one, shape, dtype, CPU, LAYOUTS[layout])
    assert on.x.is_contiguous(memory_format=torch.channels_last if LAYOUTS[layout] else torch.contiguous_format)
    others = {f"reference {name}": f for name, f in one.reference.items()} | dict(one.stock)
    assert others
    for passes, run in PASSES.items():
        ours = run(one, one.ours, on)
        for name, function in others.items():
            theirs = run(one, function, on)
            torch.testing.assert_close(
                theirs, ours, rtol=1e-6, atol=1e-6, msg=lambda m, n=name, p=passes: f"{n} {p}: {m}"
            )
    assert tuple(one.ours(on.x, *on.others).shape) == one.output


@pytest.mark.parametrize(("op", "case"), CASES)
def test_a_pass_alone_gives_what_it_gives_after_the_others(op, case):
    shape, dtype = (2, 3, 8, 12), torch.float64
    one = OPS[op].contest(case, shape, dtype, CPU)
    on = make_tensors(one, shape, dtype, CPU, True)
    for passes, whole in zip(ALONE, PASSES, strict=True):
        alone = ALONE[passes](one, one.ours, on)
        alone()  # and again
        torch.testing.assert_close(alone(), PASSES[whole](one, one.ours, on))


@pytest.mark.parametrize("device", DEVICES)
def test_beside_a_copy_alone(tmp_path, device):
    """On a GPU the calls are captured as graphs, a convolution's too."""
    path = tmp_path / "ops.json"
    command = [sys.executable, "-m", "launch.benchmark", "ops", "--quick", "--against=copy", f"--device={device}"]
    command += ["--op=upfirdn2d,conv2d", "--dtype=bf16", "--layout=nhwc", f"--json={path}"]
    env = os.environ | ({"SADDLE_OPS": "reference"} if device == "cpu" else {})
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    about = json.loads(path.read_text())
    assert about["complete"] is True and about["skipped"] == []
    assert [row["pass"] for row in about["rows"]] == list(ALONE) * (3 + 2)
    for row in about["rows"]:
        assert row["times"].keys() == {"ours", "copy"} and row["left_out"] == {}
        assert row["of_copy"] == pytest.approx(row["copy"] / row["ours"]) and row["x_reference"] is None
    assert ("in short, every op on CUDA" in done.stdout) == (device == "cuda")


def test_the_second_derivative_is_asked_for_by_all_that_the_gradient_depends_on():
    """d(ddx . 2 dy x) by dy and by x; a linear op's gradient depends on dy alone."""
    shape, dtype = (2, 3, 4, 4), torch.float64
    one = OPS["gradient_penalty"].contest("", shape, dtype, CPU)
    on = make_tensors(one, shape, dtype, CPU, False)
    by_dy, by_x = PASSES["double backward"](one, one.ours, on)
    torch.testing.assert_close(by_dy, 2 * (on.x * on.ddx).sum((1, 2, 3)))
    torch.testing.assert_close(by_x, 2 * on.dy.view(-1, 1, 1, 1) * on.ddx)
    linear = OPS["upfirdn2d"].contest("down2", shape, dtype, CPU)
    on = make_tensors(linear, shape, dtype, CPU, False)
    (by_dy,) = PASSES["double backward"](linear, linear.ours, on)
    torch.testing.assert_close(by_dy, linear.ours(on.ddx))


@pytest.mark.parametrize("device", DEVICES)
def test_a_table_for_people_and_the_same_rows_for_programs(tmp_path, device):
    path = tmp_path / "new" / "ops.json"
    command = [sys.executable, "-m", "launch.benchmark", "ops", "--quick", "--repeats=4", f"--device={device}"]
    command += ["--op=upfirdn2d,bias_leaky_relu,gradient_penalty", "--dtype=fp32", f"--json={path}"]
    env = os.environ | ({"SADDLE_OPS": "reference"} if device == "cpu" else {})  # there is nothing to compile then
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    about = json.loads(path.read_text())
    lines = done.stdout.splitlines()
    machine = about["machine"]
    for value in (machine["processor"], torch.__version__, f"{machine['kernels']} kernels", "threads 1"):
        assert value in lines[0]
    assert machine["device"] == device and machine["kernels"] == ("reference" if device == "cpu" else "compiled")
    assert about["complete"] is True and about["skipped"] == []
    rows = about["rows"]
    assert len(rows) == (3 + 1 + 1) * len(LAYOUTS) * len(PASSES)
    assert len({(r["op"], r["case"], r["layout"], r["pass"]) for r in rows}) == len(rows)
    for row in rows:
        assert not row["left_out"] and {"ours", "copy"} < row["times"].keys()
        for times in row["times"].values():
            assert 0 < times["p10"] <= times["median"] <= times["p90"] < math.inf and times["samples"] in (3, 4)
        check_figures(row)
        used = [name for name in COLUMNS if any(r[name] is not None for r in rows if r["op"] == row["op"])]
        labels = [
            row["case"] or "-",
            "x".join(map(str, row["shape"])),
            row["dtype"],
            row["layout"],
            *row["pass"].split(),
        ]
        figures = ["-" if row[name] is None else format(row[name], COLUMNS[name][1]) for name in used]
        assert len(used) >= 9 and any(line.split()[: len(labels) + len(used)] == labels + figures for line in lines)
    assert {line["class"] for line in about["summary"]} >= {f"upfirdn2d against stock: {p}" for p in PASSES}
    for line in about["summary"]:
        assert line["class"] in done.stdout and line["worst_at"] in done.stdout


def check_figures(row: dict) -> None:
    """What a row derives must follow from the times beside it."""
    medians = {name: times["median"] for name, times in row["times"].items()}
    for group in ("reference", "stock"):
        best = min(value for name, value in medians.items() if name.startswith(f"{group}: "))
        assert row[group] == best == medians[f"{group}: {row[f'{group}_is']}"]
        assert row[f"x_{group}"] == pytest.approx(best / medians["ours"])
    assert row["ours"] == medians["ours"] and row["copy"] == medians["copy"]
    assert row["of_copy"] == pytest.approx(medians["copy"] / medians["ours"])
    assert row["gb_per_s"] == pytest.approx(row["bytes"] / (medians["ours"] / 1e3) / 1e9)
    clones = row["op"] == "bias_leaky_relu" and row["pass"] == "forward"
    assert (row["clone"] == medians["clone"]) if clones else row["clone"] is None
    if row["op"] == "upfirdn2d":
        assert {"reference: separable", "reference: full"} < medians.keys()
        assert {name[-4:] for name in medians if name.startswith("stock: ")} == set(LAYOUTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op=upfirdn"], "did you mean upfirdn2d"),
        (["--op=upfirdn2d,bias_leaky"], "--op=bias_leaky is unknown; did you mean bias_leaky_relu"),
        (["--op="], "--op= is unknown; known: bias_leaky_relu, conv2d, gradient_penalty"),
        (["--dtype=fp23"], "--dtype=fp23 is unknown; did you mean fp32"),
        (["--layout=nhcw"], "--layout=nhcw is unknown; did you mean"),
        (["--device=cud"], "--device=cud is unknown; did you mean cuda"),
        (["--device=cuda"], "--device=cuda: "),
        (["--against=cop"], "--against=cop is unknown; did you mean copy"),
        (["--threads=0"], "--threads"),
        (["--repeats=0"], "--repeats"),
        (["--json=/proc/none/ops.json"], "cannot write /proc/none/ops.json: "),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ops_benchmark, "time_ops", None)
    monkeypatch.setattr(sys, "argv", ["saddle", "benchmark", "ops", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert ended.value.code == 2 and message in said.err and said.err.count("\n") == 1, said.err
    assert said.out == ""


def test_help_shows_every_file_and_does_not_wait_for_torch():
    """A benchmark is a file: each is there with the first words of its docstring, and none has been imported."""
    code = "import sys; from launch import cli; sys.argv[1:] = ['benchmark', '--help']\ntry: cli.main()\n"
    code += "except SystemExit: print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "set()", done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    for path in (ROOT / "launch" / "benchmark").glob("*_benchmark.py"):
        begins = [path.stem.removesuffix("_benchmark"), *path.read_text().removeprefix('"""').split()[:4]]
        assert begins in [words[:5] for words in lines], begins


def test_a_new_benchmark_is_one_file(tmp_path):
    (tmp_path / "new_benchmark.py").write_text('"""Measure this\nand that, at 0.5 of it. More.\n"""\nimport nothing\n')
    (tmp_path / "silent_benchmark.py").touch()
    (tmp_path / "helper.py").write_text('"""No benchmark."""')
    assert find_benchmarks(tmp_path) == {"new": "Measure this and that, at 0.5 of it.", "silent": ""}


def test_an_unknown_benchmark_is_refused():
    done = CliRunner().invoke(cli.saddle, ["benchmark", "none"])
    assert done.exit_code == 2 and "No such command 'none'" in done.output


class Scripted:
    """A clock that tells what it was asked for, and times by a script."""

    name, budget = "script", 100.0

    def __init__(self, **times):
        self.times = {name: iter(values) for name, values in times.items()}
        self.asked = []

    def warm_up(self, call):
        call()
        return Sampling(1, 0.0)

    def sample(self, call, sampling):
        name = call()
        self.asked.append(name)
        return next(self.times[name]) / 1e3


def test_contestants_take_turns_and_the_median_is_theirs():
    clock = Scripted(a=[1, 2, 9, 4, 5], b=[10, 10, 10, 10, 50], c=[3] * 5)
    times, left_out = contest({name: lambda name=name: name for name in "abc"}, clock, 5)
    assert "".join(clock.asked) == "abc" + "bca" + "cab" + "abc" + "bca"
    assert times["a"].median == pytest.approx(4) and times["b"].median == pytest.approx(10)
    assert (times["b"].p10, times["b"].p90) == pytest.approx((10, 34))  # between the fourth and the fifth of five
    assert times["c"].samples == 5 and left_out == {}


def test_a_contest_ends_when_its_time_is_up_but_has_three_rounds():
    """A round takes so many seconds, of a budget of 100. It is looked at before the fourth round and each later one."""
    for seconds, rounds in ((200, 3), (60, 4), (30, 6), (1, 9)):
        clock, now = Scripted(a=[1] * 9), iter(range(0, 9999, seconds))
        times, _ = contest({"a": lambda: "a"}, clock, 9, lambda now=now: next(now) * 1.0)
        assert times["a"].samples == len(clock.asked) == rounds


def test_a_contestant_that_cannot_run_is_left_out_and_named():
    def refuse():
        raise NotImplementedError('"kernel" not implemented for X\nand more')

    times, left_out = contest({"a": lambda: "a", "stock: b": refuse}, Scripted(a=[1] * 3), 3)
    assert set(times) == {"a"} and left_out == {"stock: b": '"kernel" not implemented for X'}
    with pytest.raises(RuntimeError, match="a bug"):
        contest({"a": lambda: (_ for _ in ()).throw(RuntimeError("a bug")).__next__()}, Scripted(), 3)


def test_the_fastest_variant_counts():
    times = {name: Times(ms, ms, ms, 3) for name, ms in (("stock: x", 3.0), ("stock: y nhwc", 2.0), ("copy", 1.0))}
    assert fastest(times, "stock") == ("y nhwc", times["stock: y nhwc"])
    assert fastest(times, "reference") is None


def row(
    op: str, case: str, shape: tuple, passes: str, device: str = "cpu", moved: int = 1000, **medians: float
) -> OpTimes:
    ours = medians["ours"]
    figures = figures_of(medians, Times(ours, ours, ours, 3), moved)
    return OpTimes(op, case, shape, "fp32", "nchw", device, passes, moved, figures, "", "", {}, {})


def test_the_summary_takes_the_rows_of_a_class():
    large, small, two_mb = (8, 64, 64, 64), (16, 256, 16, 16), (16, 128, 16, 16)
    rows = [
        row("upfirdn2d", "down2", large, "forward", ours=1, reference=9, stock=2),
        row("upfirdn2d", "blur", large, "forward", ours=2, reference=14, stock=1),
        row("upfirdn2d", "up2", large, "forward", ours=1, reference=20, stock=3),
        row("upfirdn2d", "up2", small, "forward", ours=1, reference=6, stock=3),
        row("upfirdn2d", "up2", large, "double backward", ours=1, reference=30, stock=4),
        row("bias_leaky_relu", "", large, "forward", ours=2, clone=1.8, reference=5),
        row("bias_leaky_relu", "", two_mb, "forward", ours=2, clone=0.2, reference=5),
        row("bias_leaky_relu", "", large, "forward+backward", ours=2, reference=5),
        row("gradient_penalty", "", large, "forward", "cuda", 10**8, ours=10, copy=9),
        row("gradient_penalty", "", small, "forward", "cuda", 10**7, ours=10, copy=1),
        row("gradient_penalty", "", small, "backward", "cuda", 10**7, ours=10, copy=4),
        row("conv2d", "to image", large, "forward", "cuda", 10**8, ours=10, copy=1),
        replace(
            row("conv2d", "to image", large, "forward", "cuda", 10**8, ours=10, copy=7), dtype="bf16", layout="nhwc"
        ),
    ]
    found = {(line["class"], line["figure"]): line for line in summarize_classes(rows)}
    expected = {  # rows, worst, median
        "upfirdn2d down2, blur, planes >= 64: forward": (2, 7, 8),
        "upfirdn2d up2, planes >= 64: forward": (1, 20, 20),
        "upfirdn2d, planes >= 64: double backward": (1, 30, 30),
        "upfirdn2d, planes of 16x16: forward": (1, 6, 6),
        "upfirdn2d against stock: forward": (4, 0.5, 2.5),
        "upfirdn2d against stock: double backward": (1, 4, 4),
        "bias_leaky_relu, >= 4 MB: forward": (1, 0.9, 0.9),
        "bias_leaky_relu, >= 4 MB: forward+backward": (1, 2.5, 2.5),
        "every op on CUDA, >= 64 MB, forward": (1, 0.9, 0.9),
        "every op on CUDA, less, forward": (1, 0.1, 0.1),
        "every op on CUDA, less, backward": (1, 0.4, 0.4),
        "convolutions of images on CUDA, forward": (1, 0.7, 0.7),
    }
    got = {name: (line["rows"], line["worst"], line["median"]) for (name, _), line in found.items()}
    assert got.keys() == expected.keys()
    for name, figures in expected.items():
        assert got[name] == pytest.approx(figures), name
    short = list(in_short(list(found.values())))
    assert len(short) == 4 and short[1] == (
        "in short, every op on CUDA, less, forward: median 10% of a copy's speed, worst 10% at gradient_penalty "
        "16x256x16x16 fp32 nchw; wanted >= 50%"
    )
    worst = {name: line["worst_at"] for (name, _), line in found.items()}
    assert worst["upfirdn2d against stock: forward"] == "upfirdn2d blur 8x64x64x64 fp32 nchw"


def test_ctrl_c_shows_what_has_been_measured(monkeypatch, tmp_path):
    def interrupted(*_):
        yield row("upfirdn2d", "up2", (8, 64, 64, 64), "forward", ours=1, reference=21.5, stock=3)
        raise KeyboardInterrupt

    monkeypatch.setattr(ops_benchmark, "time_ops", interrupted)
    arguments = ["benchmark", "ops", "--json", str(tmp_path / "ops.json")]
    done = CliRunner().invoke(cli.saddle, arguments, standalone_mode=False)
    assert done.return_value == 130 and "21.50" in done.output
    about = json.loads((tmp_path / "ops.json").read_text())
    assert about["complete"] is False and len(about["rows"]) == 1 and about["rows"][0]["x_reference"] == 21.5


def test_one_thread_is_timed_by_cpu_time_and_more_by_the_wall():
    one, two = timing.HostClock(1), timing.HostClock(2)
    assert (one.now, two.now) == (timing.time.process_time, timing.time.perf_counter)
    for clock in (one, two):
        calls = []
        sampling = clock.warm_up(lambda calls=calls: calls.append(1))
        assert len(calls) == 2 and 1 <= sampling.calls <= clock.most_calls
        assert clock.sample(lambda calls=calls: calls.append(1), Sampling(7, 0.0)) > 0
        assert len(calls) == 2 + 1 + 7, "a call to warm up, and those of the sample"
        clock.now = iter([10.0, 13.5]).__next__
        assert clock.sample(list, Sampling(7, 0.0)) == 0.5


STUB = r"""#!/bin/sh
case "$*" in
    -c*) echo GPU ;;
    -m\ ops.build*) echo "ops: ready in somewhere"; [ "$SADDLE_OPS" = compiled ] ;;
    -m\ pytest*) echo "$*" >> "$OUT/arguments"; echo "3 passed, 9 deselected in 1 s"; exit "$PYTEST_ENDS" ;;
    -m\ launch.benchmark\ step*)
        echo "in short, 32x32, batch 32: 2.61 x plain, 1000.0 img/s"
        echo "in short, 32x32, batch 32, GPU busy: 0.97 of the time" ;;
    -m\ launch.benchmark\ ops*)
        printf 'ops: compiling\nA GPU, compiled kernels, malloc as it is\n\n'
        echo "in short, every op on CUDA, less, forward: median 91% of a copy's speed; wanted >= 50%" ;;
    -m\ launch.gpu_resume*) echo "bit-equal: all" ;;
    -m\ launch.prepare*) mkdir "$4"; echo "made $4" ;;
    -m\ launch.train*)
        echo "tick 1 kimg 5.0 sec/tick 2.0 sec/kimg 0.40 loss/D 1.250 loss/G 0.750 left 3h"
        for word; do case $word in --outdir=*) outdir=${word#*=}; esac; done
        mkdir -p "$outdir/00000-x"
        : > "$outdir/00000-x/fakes01.png"
        exit 75 ;;
esac
"""


def gpu_check(folder: Path, **changed: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """The script with a Python that claims a GPU and does nothing -> what came of it, and the lines of its table."""
    stub, out = folder / "python", folder / "out"
    stub.write_text(STUB)
    stub.chmod(0o755)
    out.mkdir()
    env = os.environ | {"PYTHON": str(stub), "OUT": str(out), "PYTEST_ENDS": "0", "DATA": ""} | changed
    env.pop("SADDLE_WHEELS", None)
    done = subprocess.run([ROOT / "launch" / "gpu_check.sh"], env=env, cwd=folder, capture_output=True, text=True)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    heading = next(index for index, line in enumerate(lines) if line.startswith("step "))
    assert "A GPU, compiled kernels, malloc as it is" in lines[:heading]
    return done, lines[heading + 1 :]


@pytest.mark.parametrize("pytest_ends", [0, 1])
def test_gpu_check_ends_with_a_table_and_fails_if_a_step_did(tmp_path, pytest_ends):
    done, table = gpu_check(tmp_path, PYTEST_ENDS=str(pytest_ends))
    assert done.returncode == pytest_ends
    rows = [line.split()[0] for line in table]
    tests = ["tests-of-ops", "tests-of-rest"]
    assert rows == ["build", *tests, "steps", "32x32,", "32x32,", "ops", "every", "resume", "train", "all"]
    assert [line.split()[0] for line in table if "failed" in line] == [*tests, "all"] * pytest_ends
    assert "3 passed" in table[1] and "91% of a copy's speed; wanted >= 50%" in table[7] and "bit-equal" in table[8]
    assert table[4].endswith("2.61 x plain, 1000.0 img/s; wanted >= 2.5 x, memory <= 0.55")
    assert table[5].endswith("0.97 of the time; wanted >= 0.95")
    assert "skipped" in table[9]
    out = tmp_path / "out"
    assert (out / "summary.txt").read_text().splitlines()[-1] == table[-1] and (out / "tests-of-ops.txt").exists()
    collected = [word for word in (out / "arguments").read_text().split() if word.startswith("tests/")]
    assert {"tests/test_upfirdn2d.py", "tests/test_stepper.py"} < set(collected) and len(set(collected)) == len(
        collected
    )
    assert "tests/test_store.py" not in collected


def test_gpu_check_prepares_photos_and_trains_on_them(tmp_path):
    done, table = gpu_check(tmp_path, DATA="photos.zip")
    assert done.returncode == 0
    assert [line.split()[0] for line in table] == [
        *(
            "data",
            "build",
            "tests-of-ops",
            "tests-of-rest",
            "steps",
            "32x32,",
            "32x32,",
            "ops",
            "every",
            "resume",
            "train",
            "photos,",
            "all",
        )
    ]
    assert "2500 img/s, loss/D 1.250, loss/G 0.750" in table[-2]
    assert (tmp_path / "out" / "grid.png").exists()


def test_gpu_check_says_where_there_is_no_gpu(tmp_path):
    env = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path / "out"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([ROOT / "launch" / "gpu_check.sh"], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("gpu_check: no GPU") and done.stderr.count("\n") == 1
    assert done.stdout == "" and not (tmp_path / "out").exists()
