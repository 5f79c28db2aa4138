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
from gan.methods.objectives import OBJECTIVES
from gan.methods.pairs import find_pair
from gan.methods.regularizers import REGULARIZERS
from gan.ranks.distributed import Ranks, share
from gan.ranks.gradients import push, sum_gradients

TESTS = Path(__file__).parent
METHODS = {
    "r1": "regularizer.name=r1",
    "pair": "objective.name=relativistic;regularizer.name=r1_r2;data.cond=true;data.mirror=true",
}
CASES = {
    f"{dtype}-{name}": f"{steps};precision.dtype={dtype};{row}"
    for dtype, steps in (("float64", 30), ("float32", 5))
    for name, row in METHODS.items()
}
CASES["float64-critic"] = "8;precision.dtype=float64;optimizer.n_critic=2;growth.mode=none"


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


DIFFERING = """
import os, sys, torch
from gan.ranks import distributed
from gan.errors import UserError
ranks = distributed.start()
assert distributed.same_on_all("the dataset", "one") == "one"
try:
    distributed.same_on_all("the ops", "compiled" if ranks.rank < 2 else "reference")
except UserError as error:
    said = str(error)
value = distributed.fingerprint([torch.tensor([1.0, 2.0 + (ranks.rank == 1)])])
said += f"; {distributed.find_strangers(value, ranks)}"
open(os.path.join(sys.argv[1], str(ranks.rank)), "w").write(said)
distributed.stop()
distributed.end_rank()
"""


def test_what_must_be_the_same_on_all_ranks_is_refused_on_all(tmp_path):
    (tmp_path / "worker.py").write_text(DIFFERING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    env = os.environ | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "worker.py"), str(tmp_path)], env=env, check=True, timeout=120)
    said = [(tmp_path / str(rank)).read_text() for rank in range(3)]
    assert said == ["rank 2 has the ops 'reference' and rank 0 has 'compiled': make them the same; [1]"] * 3


@pytest.fixture(scope="module")
def alone() -> dict:
    return by_itself(CASES)


def relative(ours: dict, theirs: dict) -> float:
    """||a - b|| / ||b|| over all of a network's parameters."""
    assert ours.keys() == theirs.keys()
    difference = sum((ours[k].double() - theirs[k].double()).square().sum() for k in ours)
    return math.sqrt(difference / sum(t.double().square().sum() for t in theirs.values()))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_compute_the_same_step(ranks, alone, tmp_path):
    together = launch(ranks, tmp_path / "result.pt", CASES)
    for name, one in alone.items():
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


def every_pair() -> dict[str, str]:
    """The first step of every objective with every regularizer that goes with it, and of the other ways to show D
    images."""
    cases, step = {}, "1;precision.dtype=float64;regularizer.every=1;batch=16"
    plain = [name for name, entry in OBJECTIVES.items() if "group" not in entry.parameters]
    grouped = ["relativistic_average:", "mmd:", "mmd:kernel=rbf,", "mmd:critic=0,", "energy:"]
    more = ["bgan:divergence=kl,frozen=1", "f:kl:saturating=1", "f:jeffrey:form=log_ratio"]
    for objective in [*plain, *(f"{name}group=4" for name in grouped), *more]:
        for regularizer in REGULARIZERS:
            try:
                find_pair(objective, regularizer)
            except UserError:
                continue
            cases[f"{objective} {regularizer}"] = f"{step};objective.name={objective};regularizer.name={regularizer}"
    cases["diff"] = f"{step};data.aug=diff;data.cond=true"
    cases["blocks of 8"] = f"{step};objective.name=relativistic_average:group=8;distributed.group=2;batch=24"
    return cases


def test_every_objective_with_every_regularizer_on_two_ranks(tmp_path):
    cases = every_pair()
    assert len(cases) > 300
    alone, together = by_itself(cases), launch(2, tmp_path / "result.pt", cases)
    for name in cases:
        critic_free = name.startswith(("energy", "mmd:critic=0"))
        for net in ("G",) if critic_free else ("G", "D"):
            ours, theirs = together[name]["gradients"][net], alone[name]["gradients"][net]
            assert theirs and all(g.isfinite().all() for g in theirs.values()), (name, net)
            assert relative(ours, theirs) < 1e-12, (name, net)


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

    def summed(*factors: float, **given: float) -> tuple:
        parameters, totals = [*module.parameters(), unused], (f * module(torch.ones(1, 3)).sum() for f in factors)
        return sum_gradients(
            parameters, totals, 3, Ranks(), DistributedConfig(exact=exact), blocks=len(factors), **given
        )

    assert summed(4.0, 2.0) == (0, 0)
    assert module.weight.grad.eq(2).all() and module.bias.grad.eq(2).all() and unused.grad is None
    assert summed(1.0, poison, stopping=1) == (1, 1)


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


EXACT = {
    name: f"{steps};distributed.exact=true;{row}"
    for name, steps, row in (
        ("r1", 50, "run.kimg=1.6;regularizer.name=r1"),
        ("pair", 10, "objective.name=relativistic;regularizer.name=wgan_gp;data.cond=true;data.mirror=true;batch=24"),
        ("critic", 8, "regularizer.name=spectral_norm;optimizer.n_critic=2;data.aug=diff"),
    )
}


@pytest.mark.slow
def test_exact_mode_gives_the_same_bits_on_any_number_of_ranks(tmp_path):
    """Through stage boundaries; three ranks have unequal shares, and 24 samples are six blocks."""
    alone = by_itself(EXACT)
    for ranks, names in ((2, EXACT), (3, ("pair", "critic")), (4, EXACT)):
        together = launch(ranks, tmp_path / f"{ranks}.pt", {name: EXACT[name] for name in names})
        for name in names:
            one = alone[name]
            assert one["stage"] == (2 if name == "r1" else 1) and one["skipped"][-1] == [0, 0]
            for key, tensor in one["weights"].items():
                assert torch.equal(together[name]["weights"][key], tensor), (ranks, name, key)


@pytest.mark.parametrize("regularizer", ["r1", "spectral_norm", "bcr", "dragan"])
@pytest.mark.parametrize("how", ["distributed.micro=4", "distributed.micro=13", "distributed.exact=true"])
def test_parts_add_up_to_the_whole(regularizer, how):
    """Micro-batches, 12 samples each and one of 8 for the second, have the gradient of the whole batch."""
    step = f"2;precision.dtype=float64;regularizer.name={regularizer};objective.name=relativistic;growth.mode=none"
    results = by_itself({"whole": step, "parts": f"{step};{how}"})
    whole, parts = results["whole"], results["parts"]
    for net in ("G", "D"):
        assert relative(parts["gradients"][net], whole["gradients"][net]) < 1e-12
    for ours, theirs in zip(parts["losses"], whole["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)
    for key, tensor in whole["weights"].items():  # spectral normalization has moved as far
        torch.testing.assert_close(parts["weights"][key], tensor, rtol=0, atol=1e-9, msg=key)


def test_unequal_parts_on_ranks_and_gradients_sent_in_bfloat16(tmp_path):
    """Three ranks hold 12, 12 and 8 samples: two parts of 8, or one. What is sent rounds at 2^-9, once by each sender
    and once as a sum."""
    step = "2;precision.dtype=float64;objective.name=relativistic;growth.mode=none"
    cases = {"micro": f"{step};regularizer.name=spectral_norm;distributed.micro=8", "bf16": f"{step}"}
    sent = cases | {"bf16": f"{step};distributed.compress=bf16"}
    alone, together = by_itself(cases), launch(3, tmp_path / "result.pt", sent)
    for net in ("G", "D"):
        ours, theirs = together["micro"]["gradients"][net], alone["micro"]["gradients"][net]
        assert relative(ours, theirs) < 1e-12
    ours, theirs = together["bf16"]["gradients"]["D"], alone["bf16"]["gradients"]["D"]
    assert 1e-5 < relative(ours, theirs) < 2**-8


def test_what_befalls_one_rank_befalls_all(tmp_path):
    """A value that is not finite, in D's or in G's gradient of one rank, and the wish of one rank to stop."""
    cases = {name: f"6;precision.dtype=float64;poison.{name}=3;stop=2,4" for name in ("D", "G")}
    alone, together = by_itself(cases), launch(3, tmp_path / "result.pt", cases)
    for name, one in alone.items():
        assert together[name]["skipped"] == one["skipped"] == [[0, 0]] * 3 + [[1, 1]] + [[1, 0]] * 2
        assert together[name]["stops"] == one["stops"] == [0, 0, 1, 0, 1, 0]
        for key, tensor in one["weights"].items():
            torch.testing.assert_close(together[name]["weights"][key], tensor, rtol=0, atol=1e-9, msg=f"{name} {key}")
