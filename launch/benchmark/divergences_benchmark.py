"""Fit a Gaussian to a mixture by each divergence, by training and exactly, or train small f-GANs on points."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launch.cli import run
from launch.tables import json_option, save_rows, text_table

if TYPE_CHECKING:
    from gan.theory.gaussian import Mixture


class Divergences(click.Command):
    """The click command. Its help lists every divergence."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from gan.methods.divergences import DIVERGENCES
        from gan.methods.rows import help_lines

        with formatter.section("Divergences [with the parameters they take]"):
            formatter.write_dl(help_lines(DIVERGENCES), col_max=24)


@click.command(cls=Divergences)
@click.option(
    "--mixture",
    default="0.33,-1,0.065;0.67,2,2",
    show_default=True,
    metavar='"WEIGHT,MEAN,VARIANCE;..."',
    help="What a Gaussian is fitted to.",
)
@click.option("--divergences", help="Names with parameters, as in kl,jsw:pi=0.3. [default: all]")
@click.option("--exact", is_flag=True, help="Only print the exact parameters; train nothing.")
@click.option(
    "--points", type=click.Choice(["ring", "grid"]), help="Instead, train small GANs on 8 or 25 clusters in the plane."
)
@click.option(
    "--ruler", type=click.IntRange(1, 64), metavar="K", help="Instead, estimate divergences from K-dimensional samples."
)
@click.option(
    "--samples", type=click.IntRange(200), default=50_000, show_default=True, help="Samples in each set of --ruler."
)
@click.option(
    "--form",
    type=click.Choice(["paper", "log_ratio"]),
    help="Form of the f-GAN objective. [default: log_ratio if there is one; with --points: paper]",
)
@click.option("--saturating", type=bool, help="G descends the divergence itself. [default: yes; with --points: no]")
@click.option("--regularizer", help="As in `saddle train`. [default: r1_r2; with --points: r1]")
@click.option(
    "--gamma", type=click.FloatRange(min=0), help="Weight of the regularizer. [default: .002; with --points: .1]"
)
@click.option(
    "--steps", type=click.IntRange(8), help="Training steps. [default: 6000; with --points: ring 2000, grid 3000]"
)
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Runs of each divergence.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the first run; the next has 1 more."
)
@json_option
def main(
    mixture: str, divergences: str | None, exact: bool, points: str | None, json_path: Path | None, **options: Any
) -> None:
    """Fit a Gaussian to a mixture by each divergence, by training and exactly (Nowozin et al. 2016, table 1).

    D is the divergence at its global minimum over mean and deviation, F the bound that training reaches. With --points,
    train a small GAN on clusters in the plane and count the clusters that it finds. With --ruler, estimate divergences
    from samples of two Gaussians (means 1/4 apart on each axis, scales within 10 %) and compare with the exact values,
    for --seeds pairs of sets.
    """
    from gan.methods.divergences import DIVERGENCES, divergence
    from gan.methods.rows import split_names

    target = parse_mixture(mixture)
    names = list(DIVERGENCES) if divergences is None else split_names(divergences)
    rows = {name: divergence(name, "--divergences") for name in names}
    if options["regularizer"]:
        for name in names:
            check_regularizer(objective(name, options, "paper", saturating=True), options["regularizer"], points)
    seeds = range(options["seed"], options["seed"] + options["seeds"])
    table: list[dict[str, Any]] = []
    for name in names:
        if options["ruler"]:
            new = [ruler_row(name, rows[name], options["ruler"], options["samples"], seeds)]
        elif points:
            new = [points_row(name, points, seed, options) for seed in seeds]
        elif exact:
            new = [exact_row(name, rows[name], target)]
        else:
            exact_values = exact_row(name, rows[name], target)
            new = [exact_values | learned_row(name, rows[name], target, seed, options) for seed in seeds]
        table += new
        for row in new:
            click.echo(
                "  ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), err=True
            )
    click.echo(text_table(table))
    save_rows(json_path, table)


def parse_mixture(text: str) -> "Mixture":
    """ "WEIGHT,MEAN,VARIANCE;..." -> the mixture. Raises UserError for what is not one."""
    from gan.errors import UserError
    from gan.theory.gaussian import Mixture

    try:
        weights, means, variances = zip(*(map(float, part.split(",")) for part in text.split(";") if part), strict=True)
        return Mixture(weights, means, variances)
    except UserError as error:
        raise UserError(f"--mixture={text}: {error}") from None
    except ValueError:
        raise UserError(f'--mixture={text}: write "WEIGHT,MEAN,VARIANCE;WEIGHT,MEAN,VARIANCE"') from None


def exact_row(name: str, row: Any, target: "Mixture") -> dict[str, Any]:
    """Divergence, mean and deviation of the best Gaussian, and the minima beside it."""
    from gan.theory.gaussian import optima

    best, *others = optima(row, target)
    return {
        "divergence": name,
        "D": best.divergence,
        "mean": best.mean,
        "deviation": best.deviation,
        "other minima (D, mean, deviation)": " ".join(
            f"({o.divergence:.6f}, {o.mean:.6f}, {o.deviation:.6f})" for o in others
        )
        or "none",
    }


def objective(name: str, options: dict[str, Any], form: str, saturating: bool) -> str:
    """The objective's name for a divergence's, with the form and the generator's loss: those asked for, or these."""
    head, _, given = name.partition(":")
    chosen = saturating if options["saturating"] is None else options["saturating"]
    return f"f:{head}:{given}{',' * bool(given)}form={options['form'] or form},saturating={int(chosen)}"


def penalty(options: dict[str, Any], name: str, gamma: float) -> tuple[str, float]:
    """(regularizer, gamma): those asked for, or these."""
    return options["regularizer"] or name, gamma if options["gamma"] is None else options["gamma"]


def check_regularizer(objective_name: str, name: str, points: str | None) -> None:
    """Raises UserError for a regularizer that the experiment would not apply: there are no pictures, and a Gaussian is
    fitted by D's loss alone, with penalties in it."""
    from gan.errors import UserError
    from gan.methods.pairs import find_pair

    _, regularizer = find_pair(objective_name, name)
    if regularizer.pictures:
        raise UserError(f"--regularizer={name} changes pictures, and samples here are points; try another")
    if not points and not regularizer.is_penalty:
        raise UserError(
            f"--regularizer={name} is no penalty, and a Gaussian is fitted with penalties only; give --points=ring, or "
            "another regularizer"
        )


def learned_row(name: str, row: Any, target: "Mixture", seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """What training found."""
    from gan.theory.gaussian import learned

    text = objective(name, options, "log_ratio" if row.log_ratio else "paper", saturating=True)
    regularizer, gamma = penalty(options, "r1_r2", 0.002)
    found = learned(text, target, options["steps"] or 6000, seed, regularizer_name=regularizer, gamma=gamma)
    return {"seed": seed, "F": found.divergence, "learned mean": found.mean, "learned deviation": found.deviation}


def points_row(name: str, points: str, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """How a small GAN does on clusters in the plane."""
    from gan.theory.clusters import POINTS, train_points

    steps = options["steps"] or {"ring": 2000, "grid": 3000}[points]
    text = objective(name, options, "paper", saturating=False)
    return {
        "divergence": name,
        "seed": seed,
        **train_points(text, *penalty(options, "r1", 0.1), POINTS[points], seed, steps),
    }


def ruler_row(name: str, row: Any, k: int, samples: int, seeds: range) -> dict[str, Any]:
    """Mean over pairs of sets of the bound as a share of the exact value, and how often its interval holds that."""
    import numpy as np

    from gan.theory.ruler import between_gaussians, estimate_divergence

    exact, shares, held = 0.0, [], 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        p = rng.choice([-0.25, 0.25], k), rng.uniform(0.95, 1.05, k)
        q = np.zeros(k), rng.uniform(0.95, 1.05, k)
        exact = between_gaussians(row, p, q, seed=seed)
        x, y = (m + s * rng.standard_normal((samples, k)) for m, s in (p, q))
        result = estimate_divergence(row, x, y, seed)
        shares.append(result.bound / exact)
        held += result.low <= exact <= result.high
    error = float(np.std(shares, ddof=1) / len(shares) ** 0.5) if len(shares) > 1 else None
    return {
        "divergence": name,
        "last exact": exact,
        "bound / exact": float(np.mean(shares)),
        "standard error": error,
        "intervals that hold it": f"{held}/{len(shares)}",
    }


if __name__ == "__main__":
    run(main, "saddle benchmark divergences")
