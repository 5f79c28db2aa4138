"""Snapshots and training states that a stranger made, or a disk damaged: the same result, or one clear line."""

import json
import os
import random
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from snapshots import craft_snapshot, read_snapshot, write_snapshot

from gan.checkpoint import check_state, load_snapshot, load_state, newest_state, save_state, states_of
from gan.errors import UserError
from gan.run.directories import _read_options

DEEP = "[" * 100_000 + "]" * 100_000
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}
LAYOUT = {"a": ("F32", (2, 3)), "b": ("F32", (4,))}


@pytest.fixture
def snapshot(tmp_path) -> Path:
    return write_snapshot(tmp_path / "network-snapshot-0000001000.safetensors", cond=True)


def test_any_bit_that_changes_is_found(snapshot):
    """Of the tensors and of what the metadata say."""
    content = bytearray(snapshot.read_bytes())
    draw = random.Random(0)
    refused = 0
    about, tensors = read_snapshot(snapshot)
    for _ in range(60):
        changed = bytearray(content)
        changed[draw.randrange(8, len(content))] ^= 1 << draw.randrange(8)
        snapshot.write_bytes(changed)
        try:
            load_snapshot(snapshot)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        else:  # as in a space between fields of JSON
            now = read_snapshot(snapshot)
            assert now[0] == about and all(torch.equal(now[1][name], tensors[name]) for name in tensors)
    assert refused > 50


def test_zeros_and_swapped_tensors_are_found(snapshot):
    about, tensors = read_snapshot(snapshot)
    content = snapshot.read_bytes()
    snapshot.write_bytes(content[:-100] + bytes(100))
    with pytest.raises(UserError, match="SHA-256"):
        load_snapshot(snapshot)
    names = ("blocks.0.conv.bias", "blocks.1.conv0.bias")  # in the right place, one would not fit the other
    assert tensors[names[0]].shape != tensors[names[1]].shape
    with pytest.raises(UserError, match=names[0]):
        load_snapshot(craft_snapshot(snapshot, about, tensors | {names[0]: tensors[names[1]].clone()}))


def test_a_snapshot_without_a_sum_is_loaded_and_said_to_be_so(snapshot, capsys):
    from launch.samples import load_network

    assert load_snapshot(snapshot).verified
    craft_snapshot(snapshot, *read_snapshot(snapshot), verified=False)
    load_network(snapshot)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "without a SHA-256 sum" in error


@pytest.mark.parametrize("verified", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        {"latent_mean": torch.zeros(1)},
        {"first.bias": torch.zeros(96, dtype=torch.float64)},
        {"first.bias": torch.zeros(96, dtype=torch.float16)},
        {"more": torch.zeros(1)},
        {"first.bias": None},
    ],
)
def test_other_shapes_and_dtypes_are_refused(snapshot, change, verified):
    about, tensors = read_snapshot(snapshot)
    tensors = {name: t for name, t in {**tensors, **change}.items() if t is not None}
    with pytest.raises(UserError, match=next(iter(change))):
        load_snapshot(craft_snapshot(snapshot, about, tensors, verified))


@pytest.mark.parametrize(
    "change",
    [
        {"config": []},
        {"config": None},
        {"config": {"network": []}},
        {"config": {"network": {"widths": {}}}},
        {"config": {"network": {"widths": [8192.5, 1]}}},
        {"config": {"network": {"widths": [-1, 4]}}},
        {"config": {"no": 1}},
        {"channels": 0},
        {"channels": -1},
        {"channels": True},
        {"channels": 1.0},
        {"channels": 1 << 40},
        {"base": []},
        {"base": [4]},
        {"base": [4, True]},
        {"base": [1 << 40, 4]},
        {"base": None},
        {"last": 10**9},
        {"last": "1"},
        {"class_names": [1, 2, 3]},
        {"class_names": "abc"},
        {"dataset_hash": 5},
        {"stage": 2},
        {"stage": -1},
        {"stage": None},
        {"alpha": float("nan")},
        {"alpha": 7},
        {"alpha": "1"},
        {"images_seen": 1e30},
        {"images_seen": True},
        {"more": 1},
    ],
)
def test_wrong_values_in_the_metadata_are_one_line(snapshot, change):
    about, tensors = read_snapshot(snapshot)
    with pytest.raises(UserError) as refusal:
        load_snapshot(craft_snapshot(snapshot, {**about, **change}, tensors))
    assert "\n" not in str(refusal.value) and str(snapshot) in str(refusal.value)


@pytest.mark.parametrize("text", ["[]", "null", "1", '"a"', "{}", DEEP, '{"config": ' + DEEP + "}", "{", ""])
def test_metadata_that_are_no_object_are_one_line(snapshot, text):
    from safetensors.torch import save_file

    save_file(read_snapshot(snapshot)[1], snapshot, {"saddle": text})
    with pytest.raises(UserError, match="damaged or of another version"):
        load_snapshot(snapshot)


def test_a_snapshot_that_claims_wide_networks_is_refused_before_they_are_built(snapshot):
    """With 3 GB of memory: the network that it describes needs 10."""
    about, tensors = read_snapshot(snapshot)
    about["config"]["network"]["widths"] = [8192, 8192]
    craft_snapshot(snapshot, about, tensors)
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))\n"
    code = "from gan.checkpoint import load_snapshot\nload_snapshot(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", limited + code, str(snapshot)], capture_output=True, text=True)
    assert done.returncode == 1 and "and its configuration needs F32 [" in done.stderr.splitlines()[-1], done.stderr


def test_files_have_the_permissions_that_the_umask_leaves(tmp_path):
    for mask, mode in ((0o022, 0o644), (0o027, 0o640)):
        old = os.umask(mask)
        try:
            path = write_snapshot(tmp_path / f"{mask}.safetensors")
            state = save_state(tmp_path, mask, TENSORS, {}, keep=3)
        finally:
            os.umask(old)
        assert {stat.S_IMODE(file.stat().st_mode) for file in (path, *state.iterdir())} == {mode}


def rewrite(state: Path, about=None, manifest=None) -> None:
    """Write a state's plain values or its manifest anew; the sums are right unless the manifest is given."""
    from gan.checkpoint import _sha256

    if about is not None:
        (state / "state.json").write_text(about if isinstance(about, str) else json.dumps(about))
    sums = {name: _sha256(state / name) for name in ("tensors.safetensors", "state.json")}
    text = json.dumps(sums) if manifest is None else manifest if isinstance(manifest, str) else json.dumps(manifest)
    (state / "manifest.json").write_text(text)


@pytest.fixture
def run(tmp_path) -> Path:
    """A folder with states of 400 and 800 images."""
    for seen in (400, 800):
        save_state(tmp_path, seen, TENSORS, {"threads": 1, "world_size": 1}, keep=3)
    assert newest_state(tmp_path, LAYOUT, 16)[0].name == "training-state-0000000800"
    return tmp_path


@pytest.mark.parametrize(
    "change",
    [
        {"manifest": "{}"},
        {"manifest": "[]"},
        {"manifest": "null"},
        {"manifest": ""},
        {"manifest": DEEP},
        {"manifest": {"state.json": "0"}},
        {"manifest": {"state.json": [], "tensors.safetensors": {}}},
        {"manifest": {"/etc/passwd": "0"}},
        {"about": "[]"},
        {"about": "null"},
        {"about": DEEP},
        {"about": {}},
        *({"about": {"images_seen": seen}} for seen in (799, 1e30, True, 400, 10**30, -800, None, "800", 800.0)),
        {"about": {"images_seen": 800, "threads": "all"}},
        {"about": {"images_seen": 800, "threads": 10**9}},
        {"about": {"images_seen": 800, "threads": -1}},
        {"about": {"images_seen": 800, "world_size": []}},
    ],
)
def test_the_state_before_is_used_instead_of_a_wrong_one(run, change):
    rewrite(run / "training-state-0000000800", **change)
    path, passed = newest_state(run, LAYOUT, 16)
    assert path.name == "training-state-0000000400" and len(passed) == 1 and "\n" not in passed[0]


def test_a_state_within_a_batch_is_passed_over(run):
    os.rename(run / "training-state-0000000800", run / "training-state-0000000799")
    rewrite(run / "training-state-0000000799", about={"images_seen": 799})
    assert newest_state(run, LAYOUT, 16)[0].name == "training-state-0000000400"


@pytest.mark.parametrize(
    "change", [{"b": torch.ones(1)}, {"a": torch.zeros(2, 3, dtype=torch.float64)}, {"c": torch.ones(1)}, {"a": None}]
)
def test_a_state_with_tensors_of_another_layout_is_passed_over(run, change):
    """With right sums: moments of shape [1] once ended the process by a signal."""
    tensors = {name: t for name, t in {**TENSORS, **change}.items() if t is not None}
    save_state(run, 800, tensors, {}, keep=3)
    path, passed = newest_state(run, LAYOUT, 16)
    assert path.name == "training-state-0000000400" and next(iter(change)) in passed[0]
    with pytest.raises(UserError):
        load_state(run / "training-state-0000000800", LAYOUT)


def test_states_of_older_versions_need_no_strength_of_augmentation(run):
    wanted = LAYOUT | {"augmentation": ("F32", (2,))}
    assert newest_state(run, wanted)[0].name == "training-state-0000000800"
    check_state(run / "training-state-0000000800", wanted)


def test_a_copy_beside_the_states_is_no_state(run):
    for name in ("training-state-0000000800.bak", "training-state-", "training-state-1", "training-state-٠٠٠٠٠٠٠٠٠٠"):
        shutil.copytree(run / "training-state-0000000800", run / name)
    assert list(states_of(run)) == [400, 800]
    save_state(run, 1200, TENSORS, {}, keep=1)
    assert list(states_of(run)) == [1200] and (run / "training-state-0000000800.bak").exists()


def options(**change) -> dict:
    config = {"batch": 16, "run": {"kimg": 1.0}}
    return {"trajectory_hash": "x", "config": config, "images": {}, "schedule": {}} | change


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "null",
        "",
        DEEP,
        "{}",
        options(config=[]),
        options(config={"batch": "16", "run": {"kimg": 1.0}}),
        options(config={"batch": 16}),
        options(config={"batch": 16, "run": {"kimg": None}}),
        options(images=3),
        options(schedule=[]),
        options(trajectory_hash=None),
        '{"trajectory_hash": "x", "config": ' + '{"a": ' * 400 + "1" + "}" * 400 + ', "images": {}, "schedule": {}}',
    ],
)
def test_options_of_others_are_not_a_run_of_ours(tmp_path, content):
    (tmp_path / "training_options.json").write_text(content if isinstance(content, str) else json.dumps(content))
    assert _read_options(tmp_path) is None
    (tmp_path / "training_options.json").write_text(json.dumps(options()))
    assert _read_options(tmp_path) == options()
