"""1, 2, 3 (unequal shares) and 4 ranks at the same global batch compute the same step."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rank_worker import train_case

from gan.config import DistributedConfig
from gan.errors import UserError
from gan.ranks.distributed import Ranks, share
from gan.ranks.gradients import GradientSum, push

TESTS = Path(__file__).parent
METHODS = {
    "r1": "regularizer.name=r1",
    "pair": "objective.name=relativistic;regularizer.name=r1_r2;data.cond=true;data.mirror=true",
}
CASES = {
    f"{dtype}-{name}": f"{steps};precision.dtype={dtype};{row}"
    for dtype, steps in (("float64", 18), ("float32", 5))  # stage 2 begins at step 15
    for name, row in METHODS.items()
}
CASES["float64-share"] = (
    "18;precision.dtype=float64;regularizer.share=0.125;regularizer.every=1"  # a group, on one rank
)
CASES["float64-ada"] = "18;precision.dtype=float64;data.aug=ada;data.aug_kimg=1;data.aug_target=0.2"
CASES["float64-critic"] = "8;precision.dtype=float64;optimizer.n_critic=2;growth.mode=none"
RELATIVISTIC = "2;precision.dtype=float64;objective.name=relativistic;growth.mode=none"
STEPS = {  # three ranks hold 12, 12 and 8 samples of 32: two parts of 8, or one
    "micro": f"{RELATIVISTIC};regularizer.name=spectral_norm;distributed.micro=8",
    "share": f"{RELATIVISTIC};regularizer.name=r1_r2_projection;regularizer.share=0.25;distributed.micro=8",
    "bf16": RELATIVISTIC,
    "bf16 compute": "5;precision.compute=bf16;regularizer.every=1;growth.mode=none",
    "diff": "1;precision.dtype=float64;regularizer.every=1;batch=16;data.aug=diff;data.cond=true",
    "blocks of 8": "1;precision.dtype=float64;batch=24;objective.name=relativistic_average:group=8;distributed.group=2",
}
MISHAPS = {name: f"6;precision.dtype=float64;poison.{name}=3;stop=2,4" for name in ("D", "G")}  # on the last rank
EXACT = {
    name: f"{steps};distributed.exact=true;{row}"
    for name, steps, row in (
        ("r1", 18, "regularizer.name=r1"),
        ("pair", 10, "objective.name=relativistic;regularizer.name=wgan_gp;data.cond=true;data.mirror=true;batch=24"),
        ("critic", 8, "regularizer.name=spectral_norm;optimizer.n_critic=2;data.aug=ada;data.aug_kimg=0.5"),
        ("share", 8, "regularizer.share=0.25;regularizer.every=1;data.aug=diff"),
    )
}


def launch(ranks: int, output: Path, cases: dict[str, str]) -> dict:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, str(TESTS / "rank_worker.py"), str(output), *(f"{n};{c}" for n, c in cases.items())],
        env=env,
        check=True,
        timeout=300,
    )
    return torch.load(output, weights_only=True)


def by_itself(cases: dict[str, str]) -> dict:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = {}
    for name, case in cases.items():
        count, *assignments = case.split(";")
        results[name] = train_case(int(count), assignments, Ranks())
    torch.set_num_threads(threads)
    return results


@pytest.fixture(scope="module")
def alone() -> dict:
    return by_itself(CASES | STEPS | MISHAPS)


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> dict:
    """All that three ranks have to show: to start them takes longer than their work."""
    cases = CASES | STEPS | MISHAPS | {"bf16": f"{STEPS['bf16']};distributed.compress=bf16"}
    return launch(3, tmp_path_factory.mktemp("three") / "result.pt", cases)


@pytest.fixture(scope="module")
def two_and_four(tmp_path_factory) -> dict[int, dict]:
    folder = tmp_path_factory.mktemp("ranks")
    return {ranks: launch(ranks, folder / f"{ranks}.pt", CASES | EXACT) for ranks in (2, 4)}


def relative(ours: dict, theirs: dict) -> float:
    """||a - b|| / ||b|| over all of a network's parameters."""
    assert ours.keys() == theirs.keys()
    difference = sum((ours[k].double() - theirs[k].double()).square().sum() for k in ours)
    return math.sqrt(difference / sum(t.double().square().sum() for t in theirs.values()))


def check_the_same_step(together: dict, alone: dict) -> None:
    for name in CASES:
        one = alone[name]
        many, double = together[name], name.startswith("float64")
        for net in ("G", "D"):
            if net == "G" and name.endswith("critic"):
                continue  # the first of two steps has no G update
            assert one["gradients"][net]
            assert relative(many["gradients"][net], one["gradients"][net]) < (1e-12 if double else 1e-6), (name, net)
        for ours, theirs in zip(many["losses"], one["losses"], strict=True):
            for key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-4), (name, key)
        if double:
            assert one["stage"] == 2  # where the run grows, two boundaries are behind us
            for key, tensor in one["weights"].items():
                torch.testing.assert_close(many["weights"][key], tensor, rtol=0, atol=1e-9, msg=f"{name} {key}")
            assert many["alike"] == one["alike"]  # figures of images of 8 bits, which see no difference as small
            assert (0 < one["weights"]["augmentation"][0] < 0.5) == (name == "float64-ada")


def test_three_ranks_of_unequal_shares_compute_the_step_of_one(three, alone):
    check_the_same_step(three, alone)


def test_in_bfloat16_ranks_differ_by_its_rounding_alone(three, alone):
    """A rank's share of a weight gradient is rounded to 8 significant bits, wherever the shares are cut."""
    together = three["bf16 compute"]
    one = alone["bf16 compute"]
    for net in ("G", "D"):
        assert 0 < relative(together["gradients"][net], one["gradients"][net]) < 1e-2
    for ours, theirs in zip(together["losses"], one["losses"], strict=True):
        assert ours["Loss/D/loss"] == pytest.approx(theirs["Loss/D/loss"], rel=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_two_and_four_ranks_compute_the_step_of_one(ranks, two_and_four, alone):
    check_the_same_step(two_and_four[ranks], alone)


def test_what_must_be_the_same_on_all_ranks_is_refused_on_all(three):
    said = "rank 2 has the ops 'reference' and rank 0 has 'compiled': make them the same; [1]"
    assert three["differing"] == [said] * 3


def test_shares_cover_all_groups_in_order():
    for count in range(1, 20):
        for world in range(1, count + 1):
            shares = [share(count, Ranks(rank, world)) for rank in range(world)]
            assert [g for s in shares for g in s] == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_ranks_than_groups_is_refused():
    with pytest.raises(UserError, match="9 ranks but only 8 coupling groups"):
        share(8, Ranks(0, 9))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_sum_of_gradients_divides_by_the_batch_and_tells_what_is_not_finite(poison, exact):
    module, unused = torch.nn.Linear(3, 2), torch.nn.Parameter(torch.ones(1))

    def summed(*factors: float, along: float = 0.5, **given: float) -> tuple:
        parameters = [*module.parameters(), unused]
        gradients = GradientSum(parameters, 3, len(factors), how=DistributedConfig(exact=exact), **given)
        for factor in factors:
            gradients.add(factor * module(torch.ones(1, 3)).sum(), along * torch.tensor(factor))
        return gradients.finish(), gradients.stop, gradients.along

    assert summed(4.0, 2.0) == (0, 0, 3)
    assert module.weight.grad.eq(2).all() and module.bias.grad.eq(2).all() and unused.grad is None
    assert summed(1.0, poison, along=0, stopping=1)[:2] == (1, 1)
    assert summed(4.0, 2.0, along=poison)[0] == 1


def test_a_tree_is_the_same_wherever_its_leaves_are_cut():
    for count in range(1, 18):
        whole: list = []
        for index in range(count):
            push(whole, (0, index, f"{index},"))
        for world in range(1, count + 1):
            met: list = []
            for rank in range(world):
                nodes: list = []
                for index in share(count, Ranks(rank, world)):
                    push(nodes, (0, index, f"{index},"))
                for node in nodes:
                    push(met, node)
            assert met == whole
        assert "".join(total for _, _, total in whole) == "".join(f"{i}," for i in range(count))


@pytest.mark.slow
def test_exact_mode_gives_the_same_bits_on_any_number_of_ranks(two_and_four, tmp_path):
    """Through stage boundaries; three ranks have unequal shares, and 24 samples are six blocks."""
    alone = by_itself(EXACT)
    three = launch(3, tmp_path / "3.pt", {name: EXACT[name] for name in ("pair", "critic")})
    for ranks, together in (two_and_four | {3: three}).items():
        for name in EXACT.keys() & together.keys():
            one = alone[name]
            assert one["stage"] == (2 if name == "r1" else 1) and one["skipped"][-1] == [0, 0]
            for key, tensor in one["weights"].items():
                assert torch.equal(together[name]["weights"][key], tensor), (ranks, name, key)


@pytest.mark.parametrize("regularizer", ["r1", "spectral_norm", "bcr", "dragan", "dragan;regularizer.share=0.375"])
def test_parts_add_up_to_the_whole(regularizer):
    """Micro-batches, 12 samples each and one of 8 for the second, have the gradient of the whole batch."""
    step = f"{RELATIVISTIC};regularizer.name={regularizer}"
    ways = ("distributed.micro=4", "distributed.micro=13", "distributed.exact=true")
    whole, *every = by_itself({"whole": step} | {how: f"{step};{how}" for how in ways}).values()
    for parts in every:
        check_parts(parts, whole)


def check_parts(parts: dict, whole: dict) -> None:
    for net in ("G", "D"):
        assert relative(parts["gradients"][net], whole["gradients"][net]) < 1e-12
    for ours, theirs in zip(parts["losses"], whole["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)
    for key, tensor in whole["weights"].items():  # spectral normalization has moved as far
        torch.testing.assert_close(parts["weights"][key], tensor, rtol=0, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", ["micro", "share", "diff", "blocks of 8"])
def test_parts_changed_images_and_large_blocks_on_three_ranks_add_up_to_the_whole(name, three, alone):
    for net in ("G", "D"):
        assert relative(three[name]["gradients"][net], alone[name]["gradients"][net]) < 1e-12


def test_gradients_sent_in_bfloat16_are_rounded_twice(three, alone):
    """At 2^-9, once by each sender and once as a sum."""
    assert 1e-5 < relative(three["bf16"]["gradients"]["D"], alone["bf16"]["gradients"]["D"]) < 2**-8


def test_a_void_step_or_a_stop_request_of_one_rank_holds_on_all_ranks(three, alone):
    """A value that is not finite, in D's or in G's gradient of one rank, and the wish of one rank to stop."""
    for name in MISHAPS:
        one, together = alone[name], three[name]
        assert together["skipped"] == one["skipped"] == [[0, 0]] * 3 + [[1, 1]] + [[1, 0]] * 2
        assert together["stops"] == one["stops"] == [0, 0, 1, 0, 1, 0]
        for key, tensor in one["weights"].items():
            torch.testing.assert_close(together["weights"][key], tensor, rtol=0, atol=1e-9, msg=f"{name} {key}")
