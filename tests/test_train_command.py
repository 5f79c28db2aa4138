"""`saddle train` as its users meet it: from a prepared dataset to a run, stopped, gone on with, and refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from hosts import family, wait_until
from PIL import Image
from safetensors.torch import load_file

from data.prepare import prepare
from data.store import image_key
from gan.checkpoint import newest_state
from gan.methods.objectives import OBJECTIVES
from gan.methods.regularizers import REGULARIZERS
from gan.run.directories import hold
from gan.run.room import Room
from gan.trainer import GAN, train_step
from launch import cli
from launch.ranks import environment
from launch.settings import as_flags

TINY = ["--set=run.threads=1", "--set=network.widths=[8,8,8]", "--set=network.z_dim=8", "--preset=digits", "--batch=16"]
SHORT = [*TINY, "--kimg=0.8", "--tick=0.08", "--snap=1"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "digits.lmdb"
    prepare("digits", path, resolution=(16, 16), max_images=200)
    return path


def saddle(monkeypatch, *arguments: object) -> int:
    """The exit code of `saddle train ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["saddle", "train", *map(str, arguments)])
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    torch.set_num_threads(threads)
    return ended.value.code


def only_run(outdir: Path) -> Path:
    (run,) = outdir.glob("0*")
    return run


def test_a_run_from_start_to_end_and_again(digits, tmp_path, monkeypatch, capsys):
    command = [f"--data={digits}", f"--outdir={tmp_path}", *SHORT, "--set=optimizer.decay_from=1.0"]
    assert saddle(monkeypatch, *command) == 0
    run = only_run(tmp_path)
    assert run.name == "00000-digits-digits-nonsaturating-r1-16-b16"
    options = json.loads((run / "training_options.json").read_text())
    assert options["config"]["batch"] == 16 and options["config"]["network"]["widths"] == [8, 8, 8]
    printed = capsys.readouterr().out
    assert "10 classes, but training does not use them; --cond=1" in printed
    assert "note: optimizer.decay_to does nothing without optimizer.decay_from" in printed

    before = {p.name: p.stat().st_mtime_ns for p in run.iterdir()}
    assert saddle(monkeypatch, *command) == 0
    assert saddle(monkeypatch, *command, "--tick=0.4", "--snap=7", "--workers=0", "--set=run.keep=1") == 0
    assert capsys.readouterr().out.count("is finished (0.8 kimg)") == 2
    assert {
        p.name: p.stat().st_mtime_ns for p in run.iterdir() if p.name not in (".lock", "exit.json")
    }.items() <= before.items()

    assert saddle(monkeypatch, *command, "-n", "--resume=none") == 0
    assert "would start" in capsys.readouterr().out
    assert saddle(monkeypatch, *command, "--resume=none") == 0
    assert sorted(p.name[:5] for p in tmp_path.glob("0*")) == ["00000", "00001"]
    assert saddle(monkeypatch, *command, "--gamma=2") == 0  # another trajectory
    assert len(list(tmp_path.glob("0*"))) == 3


def test_a_run_grown_in_kimg_can_be_made_longer(digits, tmp_path, monkeypatch, capsys):
    flags = ["--set=growth.shares=[]", "--set=growth.kimg=[0.16,0.16]", "--set=growth.fade_kimg=0.08"]
    command = [f"--data={digits}", f"--outdir={tmp_path}", *SHORT, *flags, "--set=optimizer.decay_to=1.0"]
    assert saddle(monkeypatch, *command) == 0
    assert saddle(monkeypatch, *command, "--kimg=0.96") == 0
    assert "going on from training-state-0000000800" in capsys.readouterr().out
    run = only_run(tmp_path)
    assert (run / "network-snapshot-0000000960.safetensors").exists()
    seen = [json.loads(line)["images_seen"] for line in (run / "stats.jsonl").read_text().splitlines()]
    assert seen == sorted(set(seen)) and seen[-1] == 960


def test_a_dry_run_writes_nothing(digits, tmp_path, monkeypatch, capsys):
    assert saddle(monkeypatch, f"--data={digits}", f"--outdir={tmp_path / 'runs'}", *SHORT, "-n") == 0
    assert "would start" in capsys.readouterr().out and not (tmp_path / "runs").exists()


def test_how_the_data_is_read_changes_nothing_and_blocks_do(digits, tmp_path, monkeypatch, capsys):
    command = [f"--outdir={tmp_path / 'runs'}", *SHORT, "--kimg=0.16", "--set=growth.mode=none"]
    reading = [f"--cache={tmp_path / 'cache'}", "--workers=3", "--set=run.pages=drop"]
    assert saddle(monkeypatch, f"--data={digits}", *command, *reading, "-n") == 0
    assert not (tmp_path / "cache").exists()
    assert saddle(monkeypatch, f"--data={digits}", *command, *reading) == 0
    (copy,) = (tmp_path / "cache").glob("*.lmdb")
    out, error = capsys.readouterr()
    assert copy.read_bytes() == digits.read_bytes() and f"images of {copy}" in out and f"to {copy}" in error
    assert saddle(monkeypatch, f"--data={digits}", *command, "--resume=none") == 0
    cached, plain = sorted((tmp_path / "runs").glob("0*"))
    assert cached.name[5:] == plain.name[5:]
    weights = [load_file(run / "network-snapshot-0000000160.safetensors") for run in (cached, plain)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])

    capsys.readouterr()
    assert saddle(monkeypatch, f"--data={digits}", *command, "-n") == 0
    assert "would resume" in capsys.readouterr().out
    assert saddle(monkeypatch, f"--data={digits}", *command, "--set=data.block=8", "-n") == 0
    assert "would start" in capsys.readouterr().out


def test_flags_win_over_the_preset_and_set_over_flags(digits, tmp_path, monkeypatch, capsys):
    flags = [
        "--gamma=3",
        "--set=regularizer.gamma=4",
        "--set",
        "regularizer.every=2",
        "--mirror=true",
        "-n",
    ]
    assert saddle(monkeypatch, f"--data={digits}", f"--outdir={tmp_path}", *SHORT, *flags) == 0
    text = capsys.readouterr().out
    config = json.loads(text[: text.rindex("}") + 1])["config"]
    assert {k: config["regularizer"][k] for k in ("name", "gamma", "every")} == {"name": "r1", "gamma": 4.0, "every": 2}
    assert config["data"]["mirror"] is True and config["optimizer"]["g_lr"] == "auto"


def test_weights_to_start_from(digits, tmp_path, monkeypatch, capsys):
    command = [f"--data={digits}", *SHORT]
    assert saddle(monkeypatch, *command, f"--outdir={tmp_path / 'a'}") == 0
    run = only_run(tmp_path / "a")
    snapshot = run / "network-snapshot-0000000800.safetensors"
    for source in (snapshot, run):
        outdir = tmp_path / source.name
        flags = [f"--outdir={outdir}", f"--init-from={source}", "--set=optimizer.g_lr=1e-9"]
        assert saddle(monkeypatch, *command, *flags) == 0
        ours = load_file(only_run(outdir) / "training-state-0000000800" / "tensors.safetensors")
        theirs = load_file(run / "training-state-0000000800" / "tensors.safetensors")
        wanted = theirs["G_ema/first.weight" if source == snapshot else "G/first.weight"]
        torch.testing.assert_close(ours["G/first.weight"], wanted, rtol=1e-4, atol=1e-5)
    assert saddle(monkeypatch, *command, f"--outdir={tmp_path}/x", f"--init-from={snapshot}", "--cond=1") == 2
    error = capsys.readouterr().err
    assert "does not fit: embedding.weight of G is [10, 8] here and missing there (2 tensors differ)" in error
    other = [f"--outdir={tmp_path}/x", f"--init-from={snapshot}", "--model=vae", "--preset=vae-digits"]
    assert saddle(monkeypatch, f"--data={digits}", *other) == 2
    assert "is of another kind of model: it has G, G_ema, and this run VAE\n" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    snapshot.unlink()  # only the start needs it
    command = [*command, f"--outdir={tmp_path / snapshot.name}", f"--init-from={snapshot}", "--set=optimizer.g_lr=1e-9"]
    assert saddle(monkeypatch, *command) == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--regulariser=r1"], "No such option"),
        (["--batch=18"], "--batch=18 is not a multiple of the coupling group of 4"),
        (["--batch=many"], "many"),
        (["--batch=256"], "holds 200 images, fewer than one batch of 256"),
        (["--resolution=48"], "--resolution=48.*has sizes 4, 8, 16"),
        (["--objective=relativisitc"], "did you mean relativistic"),
        (["--regularizer=r2d2"], "did you mean r2"),
        (["--regularizer=zzz"], "known: bcr, clip, dragan"),
        (["--objective=f:jsw:pi=1"], "pi must be between 0 and 1, got 1"),
        (["--objective=f:alpha:alpha=0"], "0.02 away from 0"),
        (["--objective=energy"], "has no critic that --regularizer=r1 could regularize; give --regularizer=none"),
        (["--objective=f:tv", "--regularizer=roth"], "is zero, and so is the penalty"),
        (["--objective=hinge", "--regularizer=roth"], "use an objective f:"),
        (["--objective=energy", "--regularizer=none", "--cond=1"], "would not see which class"),
        (["--objective=energy:group=12", "--regularizer=none"], "whole blocks of 12, .*--batch=12"),
        (["--gamma=-1"], "--gamma=-?[0-9.]+ must be at least 0"),
        (["--gamma=much"], "known: auto; or give a number"),
        (["--gamma=nan"], "--gamma=nan must be at least 0"),
        (["--aug=dif"], "did you mean diff"),
        (["--set=regularizer.decay=linear"], "regularizer.decay=linear is unknown"),
        (["--preset=digit"], "did you mean digits"),
        (["--set=regularizer.gama=1"], "did you mean regularizer.gamma"),
        (["--set=optimizer.decay_to=fast"], "wants float"),
        (["--kimg=0.01"], "too short for 3 stages"),
        (["--gpus=9"], "only 4 coupling groups"),
        (["--gpus=0"], "0 is not in the range"),
        (["--data=nowhere.lmdb"], "nowhere.lmdb"),
        (["--resume=nowhere"], "is not the directory of a run"),
        (["--init-from=nowhere"], "nowhere"),
        (["--set=network.widths=[8,8]"], "network.widths was given twice"),
        (["--desc=a/b"], "leave out slashes"),
        (["--workers=-1"], "--workers=-1 must be at least 0"),
        (["--preset=PRESET"], "preset .*wrong.toml: run.kimgs: no such key; did you mean run.kimg"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(digits, tmp_path, monkeypatch, capsys, flags, message):
    outdir = tmp_path / "runs"
    (tmp_path / "wrong.toml").write_text("run.kimgs = 3")
    flags = [flag.replace("PRESET", str(tmp_path / "wrong.toml")) for flag in flags]
    assert saddle(monkeypatch, f"--data={digits}", f"--outdir={outdir}", *SHORT, *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("saddle train: error: ")
    assert re.search(message, error), error
    assert not outdir.exists()


@pytest.mark.parametrize(
    "flags,said",
    [
        (["--objective=f:pearson", "--regularizer=roth", "--gamma=2", "--set=regularizer.every=4"], ""),
        (["--objective=f:jsw:pi=0.3", "--regularizer=wgan_gp:target=0.5", "--gamma=auto", "--aug=diff"], ""),
        (["--objective=energy", "--regularizer=none"], ""),
        (["--regularizer=r1+spectral_norm+drift:weight=0.01"], ""),
        (["--objective=mmd", "--regularizer=spectral_norm"], ""),
        (["--objective=wasserstein", "--regularizer=none"], "nothing bounds the slope of D"),
        (["--objective=hinge", "--regularizer=bcr", "--gamma=0"], "gamma is 0"),
    ],
)
def test_any_pair_trains_and_goes_on(digits, tmp_path, monkeypatch, capsys, flags, said):
    command = [f"--data={digits}", f"--outdir={tmp_path}", *SHORT, "--preset=default", "--set=growth.mode=none", *flags]
    command += ["--kimg=0.08", "--tick=0.032"]
    assert saddle(monkeypatch, *command) == 0
    assert said in capsys.readouterr().out
    run = only_run(tmp_path)
    assert ":" not in run.name and "=" not in run.name
    lines = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    assert lines[-1]["Progress/skipped_steps"] == 0
    whole = load_file(run / "training-state-0000000080" / "tensors.safetensors")
    shutil.rmtree(run / "training-state-0000000080")  # and again from the state before it
    assert saddle(monkeypatch, *command, "--workers=0") == 0
    assert "going on from training-state-0000000064" in capsys.readouterr().out
    again = load_file(run / "training-state-0000000080" / "tensors.safetensors")
    assert again.keys() == whole.keys() and all(torch.equal(again[k], whole[k]) for k in whole)


def test_help_lists_every_name(monkeypatch, capsys):
    assert saddle(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    for name in [*OBJECTIVES, *REGULARIZERS]:
        assert re.search(rf"^  {re.escape(name)} +\S", text, re.M), name
    assert "Nowozin et al. 2016" in text and "Gulrajani" in text


def test_labels_that_are_not_there_cannot_be_asked_for(tmp_path, monkeypatch, capsys):
    (tmp_path / "images").mkdir()
    for i in range(20):
        Image.fromarray(np.full((16, 16), i, np.uint8)).save(tmp_path / "images" / f"{i}.png")
    prepare(str(tmp_path / "images"), tmp_path / "plain.lmdb", resolution=(16, 16))
    command = [f"--data={tmp_path / 'plain.lmdb'}", f"--outdir={tmp_path / 'runs'}", *SHORT, "--cond=1"]
    assert saddle(monkeypatch, *command) == 2
    assert "needs class labels" in capsys.readouterr().err
    prepare(str(tmp_path / "images"), tmp_path / "top.lmdb", resolution=(16, 16), levels=1)
    command = [f"--data={tmp_path / 'top.lmdb'}", f"--outdir={tmp_path / 'runs'}", *SHORT]
    assert saddle(monkeypatch, *command) == 2
    assert "prepare it with all levels, or --set growth.mode=none" in capsys.readouterr().err
    assert saddle(monkeypatch, *command, "--set=growth.mode=none", "--kimg=0.032", "--set=growth.shares=[]") == 0


def test_a_run_in_use_is_refused(digits, tmp_path, monkeypatch, capsys):
    command = [f"--data={digits}", f"--outdir={tmp_path}", *SHORT]
    assert saddle(monkeypatch, *command) == 0
    capsys.readouterr()
    with hold(only_run(tmp_path)):
        for extra in ([], ["--gpus=2"]):
            assert saddle(monkeypatch, *command, *extra) == 2
            assert "is in use by another run" in capsys.readouterr().err


def test_another_trajectory_cannot_be_resumed_into(digits, tmp_path, monkeypatch, capsys):
    command = [f"--data={digits}", f"--outdir={tmp_path}", *SHORT]
    assert saddle(monkeypatch, *command) == 0
    run = only_run(tmp_path)
    assert saddle(monkeypatch, *command, f"--resume={run}", "--kimg=7") == 2
    assert "is the same run with --kimg=" in capsys.readouterr().err
    assert saddle(monkeypatch, *command, f"--resume={run}", "--gamma=7") == 2
    assert "other values of config.regularizer.gamma" in capsys.readouterr().err
    assert saddle(monkeypatch, *command, f"--resume={run}") == 0
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "training_options.json").write_text("{}")
    assert saddle(monkeypatch, *command, f"--resume={tmp_path / 'theirs'}") == 2
    assert "is not the directory of a run of Saddlepoint" in capsys.readouterr().err


def test_a_damaged_state_is_passed_over(digits, tmp_path, monkeypatch, capsys):
    command = [f"--data={digits}", f"--outdir={tmp_path}", *SHORT]
    assert saddle(monkeypatch, *command) == 0
    run = only_run(tmp_path)
    newest = run / "training-state-0000000800" / "tensors.safetensors"
    whole = newest.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for damage in (bytes(flipped), whole[: len(whole) // 2]):
        newest.write_bytes(damage)
        capsys.readouterr()
        assert saddle(monkeypatch, *command) == 0
        out = capsys.readouterr().out
        assert "damaged" in out and "going on from training-state-0000000720" in out
        assert newest.read_bytes() == whole  # trained again from the state before, bit for bit
        seen = [json.loads(line)["images_seen"] for line in (run / "stats.jsonl").read_text().splitlines()]
        assert seen == list(range(80, 801, 80))


def start(command: list[str], folder: Path, **options: Any) -> subprocess.Popen:
    """From a folder where people keep their own data/ and ops.py, which must not shadow ours."""
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "__init__.py").write_text("raise RuntimeError('the wrong data')")
    (folder / "ops.py").write_text("raise RuntimeError('the wrong ops')")
    command = [sys.executable, "-m", "launch.train", *command]
    return subprocess.Popen(command, env=environment(2), cwd=folder, **options)


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, True])
def test_another_number_of_ranks_goes_on_with_the_same_samples_and_draws(digits, tmp_path, monkeypatch, capfd, exact):
    """Equal to rounding, and it says that it is not bit for bit; but in exact mode it is."""
    command = [f"--data={digits}", f"--outdir={tmp_path}", *SHORT]
    command += ["--set=distributed.exact=true"] if exact else ["--set=precision.dtype=float64"]
    assert saddle(monkeypatch, *command, "--gpus=2") == 0
    newest = only_run(tmp_path) / "training-state-0000000800" / "tensors.safetensors"
    whole = {k: v.clone() for k, v in load_file(newest).items()}  # else it is the file that is about to change
    newest.write_bytes(b"damaged")
    assert saddle(monkeypatch, *command) == 0
    note = "world size was 2: samples and draws stay the same; results are equal only up to rounding"
    assert (note in capfd.readouterr().out) != exact
    ours = load_file(newest)
    for name in whole:
        torch.testing.assert_close(ours[name], whole[name], rtol=0, atol=0 if exact else 1e-9, msg=name)


@pytest.mark.slow
def test_ranks_that_stop_on_values_that_are_not_finite_exit_with_3(digits, tmp_path, monkeypatch, capfd):
    flags = ["--gpus=2", "--set=optimizer.d_lr=1e30", "--set=run.max_skipped=2", "--set=regularizer.every=1"]
    assert saddle(monkeypatch, f"--data={digits}", f"--outdir={tmp_path}", *SHORT, *flags) == 3
    printed = capfd.readouterr().out
    assert re.search(r"stopped: the gradients of 5 steps in a row were not finite, in [DG]\.\S+;", printed)
    assert json.loads((only_run(tmp_path) / "exit.json").read_text())["code"] == 3


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ranks outlive a command that is killed")
def test_ranks_end_with_their_command_however_it_ends(digits, tmp_path):
    for number, stop in enumerate((signal.SIGTERM, signal.SIGKILL)):
        outdir = tmp_path / str(number)
        process = start(
            [f"--data={digits}", f"--outdir={outdir}", *TINY, "--kimg=400", "--gpus=2", "--tick=0.16"], tmp_path
        )
        wait_until(lambda outdir=outdir: list(outdir.glob("*/log.txt")), 120)
        below = family(process.pid)
        assert len(below) >= 4  # the command, torchrun, two ranks
        process.send_signal(stop)
        process.wait(timeout=60)
        wait_until(lambda below=below: not any(Path(f"/proc/{pid}").exists() for pid in below), 60)
        with hold(only_run(outdir)):  # nobody has it any longer
            pass


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds child processes in /proc")
def test_killed_in_mid_fade_the_same_command_ends_bit_equal(digits, tmp_path):
    """Two ranks; SIGKILL to all of them while the last stage fades in."""
    flags = [f"--data={digits}", *TINY, "--kimg=4", "--tick=0.16", "--snap=1", "--set=run.keep=99", "--gpus=2"]
    commands = {name: [*flags, f"--outdir={tmp_path / name}"] for name in ("whole", "killed")}
    assert start(commands["whole"], tmp_path).wait(timeout=300) == 0

    process = start(commands["killed"], tmp_path)
    fading = range(2000, 2200)  # the last stage starts at 1.8 kimg and is faded in at 2.24
    states = lambda: [int(s.name[-10:]) for s in (tmp_path / "killed").glob("*/training-state-*")]  # noqa: E731
    wait_until(lambda: any(seen in fading for seen in states()), 300)
    for pid in family(process.pid):
        os.kill(pid, signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert max(states()) < 2240

    assert start(commands["killed"], tmp_path).wait(timeout=300) == 0
    ends = [only_run(tmp_path / name) / "training-state-0000004000" for name in ("whole", "killed")]
    whole, killed = (load_file(end / "tensors.safetensors") for end in ends)
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[k], killed[k]) for k in whole)
    logs = [(only_run(tmp_path / name) / "stats.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    losses = [[(json.loads(x)["images_seen"], json.loads(x)["Loss/D/loss"]) for x in log] for log in logs]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("gpus", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_outlives_the_reader_of_its_output(digits, tmp_path, gpus):
    """As in `saddle train ... | head -5`."""
    outdir = tmp_path / "runs"
    flags = [f"--data={digits}", f"--outdir={outdir}", f"--gpus={gpus}", *SHORT]
    with start(flags, tmp_path, stdout=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline() for _ in range(2)]
        process.stdout.close()
        assert process.wait() == 0
    assert all(lines)
    run = only_run(outdir)
    log = (run / "log.txt").read_text()
    assert "standard output is closed" in log and "tick 10 " in log
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    assert newest_state(run)[0].name == "training-state-0000000800"


def test_a_run_that_differs_in_length_or_batch_alone_is_named(digits, tmp_path, monkeypatch, capsys):
    command = [f"--data={digits}", f"--outdir={tmp_path}", *SHORT]
    assert saddle(monkeypatch, *command) == 0
    run = only_run(tmp_path)
    capsys.readouterr()
    for flag in ("--kimg=1.6", "--kimg=0.4"):
        assert saddle(monkeypatch, *command, flag) == 2
        told = capsys.readouterr().err
        assert f"{run} is the same run with --kimg=0.8" in told and told.count("\n") == 1
        assert f"--init-from={run} and --set growth.mode=none" in told and "--resume=none" in told
    assert saddle(monkeypatch, *command, "--batch=32") == 2
    told = capsys.readouterr().err
    assert f"{run} is the same run with --batch=16" in told and "--resume=none" in told
    assert only_run(tmp_path)

    longer = [*command, "--kimg=1.2", f"--init-from={run}", "--set=growth.mode=none", "--set=growth.shares=[]"]
    assert saddle(monkeypatch, *longer) == 0
    assert saddle(monkeypatch, *command, "--batch=32", "--resume=none") == 0
    assert saddle(monkeypatch, *command, "--batch=32") == 0 and "is finished" in capsys.readouterr().out
    assert len(list(tmp_path.glob("0*"))) == 3


def test_keys_in_messages_become_flags_and_other_words_do_not():
    assert as_flags("batch=30 is not a multiple; try batch=32") == "--batch=30 is not a multiple; try --batch=32"
    assert as_flags("raise run.kimg or growth.kimg=3 of a/run.kimg.txt") == (
        "raise --kimg or growth.kimg=3 of a/run.kimg.txt"
    )
    for text in ("a batch and a seed", "run seed=1/00000-x is finished", "no dataset at data/my batch=3/x.lmdb"):
        assert as_flags(text) == text
    assert as_flags("or raise run.kimg.") == "or raise --kimg." and as_flags("give resume=a/b") == "give --resume=a/b"
    assert (
        as_flags("run.kimgs: no such key; did you mean run.kimg?") == "run.kimgs: no such key; did you mean run.kimg?"
    )


@pytest.mark.parametrize("check,code", [("never", 0), ("first", 2), ("always", 2)])
def test_a_flipped_pixel_ends_training_unless_checks_are_off(digits, tmp_path, monkeypatch, capsys, check, code):
    path = tmp_path / "flipped.lmdb"
    content = bytearray(digits.read_bytes())
    with lmdb.open(str(digits), subdir=False, readonly=True, lock=False) as env, env.begin() as transaction:
        value = transaction.get(image_key(2, 11))  # an image of the last stage
    content[content.index(value) + 100] ^= 1
    path.write_bytes(content)
    command = [f"--data={path}", f"--outdir={tmp_path / 'runs'}", *SHORT, f"--set=data.check={check}"]
    assert saddle(monkeypatch, *command) == code
    damaged = "image 11 at 16x16 in" in capsys.readouterr().err
    assert damaged == (code == 2)


def test_a_dry_run_shows_what_each_stage_needs(digits, tmp_path, monkeypatch, capsys):
    command = [f"--data={digits}", f"--outdir={tmp_path}", *SHORT, "--gpus=2", "--set=distributed.micro=auto", "-n"]
    monkeypatch.setattr("gan.ranks.distributed.check_devices", lambda ranks: None)
    assert saddle(monkeypatch, *command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "distributed.micro=auto: all samples per backward pass" in lines
    heading = "estimated for a rank with 8 of 16 samples: memory to about 20 %, time roughly"
    room, names, *rows = lines[lines.index(heading) + 1 :]
    assert room.startswith("memory of ") and room.endswith(" GB per rank")
    assert [row.split()[0] for row in rows] == ["4x4", "8x8", "16x16"]
    assert names.endswith("largest batch  sec/step")
    assert int(rows[0].split()[-2]) > int(rows[-1].split()[-2]) > 16 and float(rows[-1].split()[-1]) > 0


def test_a_batch_that_cannot_fit_is_refused_before_anything_is_written(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gan.run.room.find_room", lambda ranks=1: Room("a toy", 2_500_000, overhead=0))
    command = [f"--data={digits}", f"--outdir={tmp_path / 'runs'}", *SHORT, "--batch=64"]
    assert saddle(monkeypatch, *command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not (tmp_path / "runs").exists()
    assert "--batch=64 at 16x16 does not fit into memory" in error
    largest = re.search(r"the largest batch that does is (--batch=\d+)", error)[1]
    assert saddle(monkeypatch, *command, largest, "--kimg=1") == 0


def test_micro_auto_splits_the_batch(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gan.run.room.find_room", lambda ranks=1: Room("a toy", 2_500_000, overhead=0))
    command = [f"--data={digits}", *SHORT, "--batch=64", "--kimg=1"]
    assert saddle(monkeypatch, *command, f"--outdir={tmp_path / 'a'}", "--set=distributed.micro=auto") == 0
    found = re.search(r"distributed.micro=auto: (\d+) samples per backward pass", capsys.readouterr().out)
    assert 4 <= int(found[1]) <= 32
    assert saddle(monkeypatch, *command, f"--outdir={tmp_path / 'b'}", f"--set=distributed.micro={found[1]}") == 0
    one, other = (load_file(next((tmp_path / run).glob("*/*0001024.safetensors"))) for run in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_that_runs_out_of_memory_says_so_in_one_line(digits, tmp_path, monkeypatch, capsys):
    steps = []

    def step(state, *rest):
        steps.append(state)
        if len(steps) == 3:
            torch.empty(2**60, dtype=torch.uint8)
        return train_step(state, *rest)

    command = [f"--data={digits}", f"--outdir={tmp_path}", *SHORT]
    with monkeypatch.context() as patched:
        patched.setattr("gan.families.FAMILIES", {"gan": replace(GAN, step=step)})
        assert saddle(patched, *command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "error: after 32 images: out of memory on cpu" in error
    assert "distributed.micro=auto" in error
    run = only_run(tmp_path)
    assert json.loads((run / "exit.json").read_text())["code"] == 2
    assert saddle(monkeypatch, *command) == 0 and "is finished" not in capsys.readouterr().out
