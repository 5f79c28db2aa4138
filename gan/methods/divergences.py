"""f-divergences, as rows of functions: D_f(P||Q) = E_Q[f(u)], u = p/q, P the data (Nowozin et al. 2016).

The generator f is authoritative. Where the literature prints p and q swapped (Pearson, Neyman, alpha), half the value
(Jensen-Shannon) or a conjugate that turns down (Pearson, alpha > 1), the mathematics wins: `pearson` is the integral of
(p - q)^2 / q, `js2` is twice the Jensen-Shannon divergence (the f-GAN paper's generator), `js` the divergence itself,
and every f* is the supremum over u >= 0, hence never decreasing.

D_f >= E_P[T] - E_Q[f*(T)] for any T. A `Form` makes T of a network's raw output v: "paper" by an activation into the
domain of f* (Nowozin et al. 2016, table 2; for jsw and alpha < 1 the one that is affine in log u), "log_ratio" by
T = f'(e^v), so that v itself estimates log u. Both keep f*(T(v)) as one closed form. Exponentials go on along their
tangent from KNEE on, so that it is finite for outputs of any size. Exceptions: alpha of large size in the log-ratio
form, and alpha just above 1, overflow in float32 at outputs of 1000 and more.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from gan.errors import UserError
from gan.methods.rows import Entry, look_up

Function = Callable[[Tensor], Tensor]
KNEE = 3.0  # where exponentials go on along their tangent; farther out their gradients upset training


def identity(v: Tensor) -> Tensor:
    """v itself, in forms that bend nothing."""
    return v


@dataclass(frozen=True)
class Form:
    """T as a function of the raw output v; every function maps [N] to [N]."""

    value: Function  # T(v), increasing, inside the domain of f*
    conjugate: Function  # f*(T(v))
    curvature: Function  # f*''(T) T'(v)^2: the weight of |grad v|^2 in Roth et al. 2017
    boundary: float = 0.0  # where T = f'(1): a sample with v above it is called real
    bend: Function = identity  # v as the exponentials of `extended` see it; of a log-ratio form this is log u
    unbent: "Form | None" = None  # the form that `extended` has bent

    @property
    def plain(self) -> "Form":
        """The form with nothing bent, which overflows sooner: T = f'(e^v) exactly where it is a log-ratio form."""
        return self.unbent or self


@dataclass(frozen=True)
class Divergence:
    """One row; u > 0 is the density ratio, t a value of T."""

    generator: Function  # f(u), convex
    derivative: Function  # f'(u), the optimal T
    second: Function  # f''(u)
    inner_conjugate: Function  # f*(t) inside its domain
    conjugate_derivative: Function  # f*'(t), the u at which the supremum is taken
    domain: float  # upper end of the domain of f*
    threshold: float  # f'(1)
    paper: Form
    log_ratio: Form | None  # None where f' is a step

    def conjugate(self, t: Tensor) -> Tensor:
        """f*(t) = sup over u >= 0 of ut - f(u), infinite above the domain."""
        return torch.where(t > self.domain, math.inf, self.inner_conjugate(t.clamp(max=self.domain)))

    def form(self, name: str) -> Form:
        """The form "paper" or "log_ratio". Raises UserError where there is none."""
        forms = {"paper": self.paper, "log_ratio": self.log_ratio}
        found = forms.get(name)
        if found is None:
            raise UserError(f"no form {name}; there is {' and '.join(k for k, v in forms.items() if v)}")
        return found


# ---- not overflowing ------------------------------------------------------------------------------------------------


def tangent(x: Tensor) -> Tensor:
    """x up to KNEE, KNEE + log(1 + x - KNEE) beyond: its exponential is e^x, continued by the tangent."""
    over = x - KNEE
    return torch.where(over > 0, KNEE + over.clamp(min=0).log1p(), x)


def extended(form: Form, lower: bool = True, upper: bool = True, rate: float = 1.0) -> Form:
    """The form at a v that grows like a logarithm beyond KNEE / rate, on the sides where an exponential would overflow.

    A clamp would leave no gradient. Were T and f*(T) continued along tangents of their own, f*(T) would no longer be
    the conjugate of T, and the bound no bound. This one is a bound everywhere, and changes nothing inside the knees.
    """

    def s(v: Tensor) -> Tensor:
        v = tangent(rate * v) / rate if upper else v
        return -tangent(-rate * v) / rate if lower else v

    def slope(v: Tensor) -> Tensor:
        over = torch.maximum(rate * v * upper, -rate * v * lower) - KNEE
        return 1 / (1 + over.clamp(min=0))

    return Form(
        lambda v: form.value(s(v)),
        lambda v: form.conjugate(s(v)),
        lambda v: form.curvature(s(v)) * slope(v).square(),
        form.boundary,
        bend=s,
        unbent=form,
    )


class _LogOmega(torch.autograd.Function):
    """x + e^x = z: the logarithm of Wright's omega, x = log W(e^z), differentiable as often as one likes."""

    @staticmethod
    def forward(ctx, z):
        x = torch.where(z > 1, z.clamp(min=1).log(), z - z.clamp(max=1).exp())
        for _ in range(8):  # Newton on a convex function: quadratic, from the side where e^x never overflows
            e = x.exp()
            x = x - (x + e - z) / (1 + e)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * torch.sigmoid(-x)  # dx/dz = 1 / (1 + e^x), a function of x again


def log_omega(z: Tensor) -> Tensor:
    """log W(e^z), W Lambert's function, for any real z; its derivative is 1 / (1 + W). [...] -> [...]."""
    return _LogOmega.apply(z)


def bounded(v: Tensor) -> Tensor:
    """tanh(v), with a tail that falls like 1/v instead of e^-2v beyond KNEE, so that |v| = 200 keeps a gradient."""
    gap, over = 1 - math.tanh(KNEE), (v.abs() - KNEE).clamp(min=0)
    return torch.where(v.abs() > KNEE, v.sign() * (1 - gap / (1 + (2 - gap) * over)), v.tanh())


def power(b: Tensor, p: float) -> Tensor:
    """max(b, 0)^p with a gradient of zero where b is not positive, not of NaN or infinity. [...] -> [...]."""
    return torch.where(b > 0, torch.where(b > 0, b, 1.0) ** p, 0.0)


# ---- the rows -------------------------------------------------------------------------------------------------------


def _tv() -> Divergence:
    return Divergence(
        generator=lambda u: (u - 1).abs() / 2,
        derivative=lambda u: (u - 1).sign() / 2,
        second=torch.zeros_like,
        inner_conjugate=lambda t: t.clamp(min=-0.5),
        conjugate_derivative=lambda t: (t >= -0.5).to(t.dtype),
        domain=0.5,
        threshold=0.0,
        paper=Form(lambda v: bounded(v) / 2, lambda v: bounded(v) / 2, torch.zeros_like),
        log_ratio=None,
    )


def _kl() -> Divergence:
    return Divergence(
        generator=lambda u: u * u.log(),
        derivative=lambda u: 1 + u.log(),
        second=lambda u: 1 / u,
        inner_conjugate=lambda t: (t - 1).exp(),
        conjugate_derivative=lambda t: (t - 1).exp(),
        domain=math.inf,
        threshold=1.0,
        paper=extended(Form(lambda v: v, lambda v: (v - 1).exp(), lambda v: (v - 1).exp(), 1.0), lower=False),
        log_ratio=extended(Form(lambda d: 1 + d, torch.exp, torch.exp), lower=False),
    )


def _rkl() -> Divergence:
    form = extended(Form(lambda v: -(-v).exp(), lambda v: v - 1, torch.ones_like), upper=False)
    return Divergence(
        generator=lambda u: -u.log(),
        derivative=lambda u: -1 / u,
        second=lambda u: u**-2,
        inner_conjugate=lambda t: -1 - (-t).log(),
        conjugate_derivative=lambda t: -1 / t,
        domain=0.0,
        threshold=-1.0,
        paper=form,
        log_ratio=form,
    )


def _pearson() -> Divergence:
    def conjugate(t: Tensor) -> Tensor:
        return torch.where(t > -2, t * t / 4 + t, -1.0)

    return Divergence(
        generator=lambda u: (u - 1) ** 2,
        derivative=lambda u: 2 * (u - 1),
        second=lambda u: torch.full_like(u, 2.0),
        inner_conjugate=conjugate,
        conjugate_derivative=lambda t: (1 + t / 2).clamp(min=0),
        domain=math.inf,
        threshold=0.0,
        paper=Form(lambda v: v, conjugate, lambda v: (v > -2).to(v.dtype) / 2),
        log_ratio=extended(Form(lambda d: 2 * d.expm1(), lambda d: (2 * d).expm1(), lambda d: 2 * (2 * d).exp())),
    )


def _neyman() -> Divergence:
    return Divergence(
        generator=lambda u: (1 - u) ** 2 / u,
        derivative=lambda u: 1 - u**-2,
        second=lambda u: 2 * u**-3,
        inner_conjugate=lambda t: 2 - 2 * (1 - t).sqrt(),
        conjugate_derivative=lambda t: (1 - t) ** -0.5,
        domain=1.0,
        threshold=0.0,
        paper=extended(
            Form(lambda v: -(-v).expm1(), lambda v: -2 * (-v / 2).expm1(), lambda v: (-v / 2).exp() / 2),
        ),
        log_ratio=extended(
            Form(lambda d: -(-2 * d).expm1(), lambda d: -2 * (-d).expm1(), lambda d: 2 * (-d).exp()),
        ),
    )


def _hellinger2() -> Divergence:
    return Divergence(
        generator=lambda u: (u.sqrt() - 1) ** 2,
        derivative=lambda u: 1 - u**-0.5,
        second=lambda u: u**-1.5 / 2,
        inner_conjugate=lambda t: t / (1 - t),
        conjugate_derivative=lambda t: (1 - t) ** -2,
        domain=1.0,
        threshold=0.0,
        paper=extended(Form(lambda v: -(-v).expm1(), torch.expm1, lambda v: 2 * v.exp())),
        log_ratio=extended(
            Form(lambda d: -(-d / 2).expm1(), lambda d: (d / 2).expm1(), lambda d: (d / 2).exp() / 2),
        ),
    )


def _jeffrey() -> Divergence:
    def ratio(t: Tensor) -> Tensor:
        """log u at which f'(u) = t: u = 1 / W(e^(1-t))."""
        return -log_omega(1 - t)

    def conjugate(t: Tensor) -> Tensor:
        d = ratio(t)
        return d.expm1() + d

    def curvature(t: Tensor) -> Tensor:
        d = ratio(t)
        return d.exp() * d.sigmoid()  # 1 / f''(u) = u^2 / (1 + u)

    return Divergence(
        generator=lambda u: (u - 1) * u.log(),
        derivative=lambda u: 1 + u.log() - 1 / u,
        second=lambda u: 1 / u + u**-2,
        inner_conjugate=conjugate,
        conjugate_derivative=lambda t: ratio(t).exp(),
        domain=math.inf,
        threshold=0.0,
        paper=extended(Form(lambda v: v, conjugate, curvature), lower=False),
        log_ratio=extended(Form(lambda d: d - (-d).expm1(), lambda d: d.expm1() + d, lambda d: 1 + d.exp())),
    )


def _gan(shift: float = 0.0) -> Divergence:
    """js2 adds log 4 to D and log 2 to T: the same game."""
    form = Form(lambda v: logsigmoid(v) + shift, lambda v: softplus(v) - shift, torch.sigmoid)
    return Divergence(
        generator=lambda u: u * u.log() - (u + 1) * (u + 1).log() + (u + 1) * shift,
        derivative=lambda u: -(1 / u).log1p() + shift,
        second=lambda u: 1 / (u * (1 + u)),
        inner_conjugate=lambda t: -(-(t - shift).expm1()).log() - shift,
        conjugate_derivative=lambda t: 1 / (shift - t).expm1(),
        domain=shift,
        threshold=shift - math.log(2),
        paper=form,
        log_ratio=form,
    )


def _jsw(pi: float) -> Divergence:
    if not 0 < pi < 1:
        raise UserError(f"pi must be between 0 and 1, got {pi:g}")
    offset, log_pi, log_rest = math.log(pi / (1 - pi)), math.log(pi), math.log(1 - pi)

    def form(shift: float) -> Form:
        return Form(
            lambda v: pi * (logsigmoid(v + shift) - log_pi),
            lambda v: (1 - pi) * (log_rest + softplus(v + shift)),
            lambda v: (1 - pi) * torch.sigmoid(v + shift),
            offset - shift,
        )

    def mean(u: Tensor) -> Tensor:
        return 1 - pi + pi * u

    return Divergence(
        generator=lambda u: pi * u * u.log() - mean(u) * mean(u).log(),
        derivative=lambda u: pi * (u / mean(u)).log(),
        second=lambda u: pi * (1 - pi) / (u * mean(u)),
        inner_conjugate=lambda t: (1 - pi) * (log_rest - (-pi * (t / pi).exp()).log1p()),
        conjugate_derivative=lambda t: (1 - pi) / ((-t / pi).exp() - pi),
        domain=-pi * log_pi,
        threshold=0.0,
        paper=form(0.0),
        log_ratio=form(offset),
    )


def _alpha(alpha: float) -> Divergence:
    if not (abs(alpha) <= 8 and abs(alpha) >= 0.02 and abs(alpha - 1) >= 0.02):
        raise UserError(f"alpha must be within -8 and 8 and 0.02 away from 0 (rkl) and 1 (kl), got {alpha:g}")
    a, rest = alpha, 1 - alpha

    def base(t: Tensor) -> Tensor:
        return 1 - rest * t  # u^(alpha - 1)

    def conjugate(t: Tensor) -> Tensor:
        return ((power(base(t), -a / rest) if a > 1 else base(t) ** (-a / rest)) - 1) / a

    if a > 1:  # below the knee at T = -1 / (alpha - 1) the supremum is at u = 0, and f* constant
        paper = Form(lambda v: v, conjugate, lambda v: power(base(v), (2 - a) / (a - 1)))
    else:
        paper = extended(
            Form(
                lambda v: -(-v).expm1() / rest,
                lambda v: (v * a / rest).expm1() / a,
                lambda v: (v * a / rest).exp() / rest**2,
            ),
            rate=max(1.0, a / rest),
        )
    return Divergence(
        generator=lambda u: (u**a - 1 - a * (u - 1)) / (a * (a - 1)),
        derivative=lambda u: (u ** (a - 1) - 1) / (a - 1),
        second=lambda u: u ** (a - 2),
        inner_conjugate=conjugate,
        conjugate_derivative=lambda t: power(base(t), -1 / rest),
        domain=1 / rest if a < 1 else math.inf,
        threshold=0.0,
        paper=paper,
        log_ratio=extended(
            Form(lambda d: ((a - 1) * d).expm1() / (a - 1), lambda d: (a * d).expm1() / a, lambda d: (a * d).exp())
        ),
    )


def scaled(row: Divergence, factor: float) -> Divergence:
    """factor * D_f, factor > 0: (c f)*(t) = c f*(t / c)."""

    def form(inner: Form) -> Form:
        return Form(
            lambda v: factor * inner.value(v),
            lambda v: factor * inner.conjugate(v),
            lambda v: factor * inner.curvature(v),
            inner.boundary,
            inner.bend,
            form(inner.unbent) if inner.unbent else None,
        )

    return replace(
        row,
        generator=lambda u: factor * row.generator(u),
        derivative=lambda u: factor * row.derivative(u),
        second=lambda u: factor * row.second(u),
        inner_conjugate=lambda t: factor * row.inner_conjugate(t / factor),
        conjugate_derivative=lambda t: row.conjugate_derivative(t / factor),
        domain=factor * row.domain,
        threshold=factor * row.threshold,
        paper=form(row.paper),
        log_ratio=form(row.log_ratio) if row.log_ratio else None,
    )


def from_generator(f: Function, reach: float = 40.0) -> Divergence:
    """A row from f alone, for research: f' and f'' by autograd, f* by solving f'(u) = t over |log u| <= reach.

    f: smooth and strictly convex on u > 0, written in torch, finite up to e^reach. Both forms are the log-ratio one,
    which needs no f*. As a row of DIVERGENCES, "name": Entry("what and where from", lambda: from_generator(f)), it is
    an objective f:name, part of the benchmarks and a line of their help too.
    """
    first = torch.func.grad(lambda u: f(u).sum())
    second = torch.func.grad(lambda u: first(u).sum())
    # No limit of f' in sight means that there is none.
    last, before = (first(torch.tensor(x, dtype=torch.float64).exp()).item() for x in (reach, reach - 5))
    domain = last if abs(last - before) < 1e-6 else math.inf

    @torch.no_grad()
    def solution(t: Tensor) -> Tensor:
        """The u at which f'(u) = t, a constant."""
        low = torch.full_like(t, -reach, dtype=torch.float64)
        high = -low
        for _ in range(60):
            middle = (low + high) / 2
            below = first(middle.exp()) < t
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return low.exp().to(t.dtype)

    def argument(t: Tensor) -> Tensor:
        u = solution(t)
        return u + (t - t.detach()) / second(u)  # du/dt is 1 / f''(u)

    def conjugate(t: Tensor) -> Tensor:
        u = solution(t)  # constant: at the supremum its change is worth nothing, so d/dt is u
        return u * t - f(u)

    form = extended(
        Form(
            lambda d: first(d.exp()),
            lambda d: d.exp() * first(d.exp()) - f(d.exp()),
            lambda d: (2 * d).exp() * second(d.exp()),
        )
    )
    threshold = first(torch.ones((), dtype=torch.float64)).item()
    return Divergence(f, first, second, conjugate, argument, domain, threshold, form, form)


DIVERGENCES: dict[str, Entry[Divergence]] = {
    "tv": Entry("total variation, the integral of |p - q| / 2", _tv),
    "kl": Entry("Kullback-Leibler, KL(P||Q)", _kl),
    "rkl": Entry("reverse Kullback-Leibler, KL(Q||P)", _rkl),
    "pearson": Entry("Pearson's chi-square, the integral of (p - q)^2 / q", _pearson),
    "neyman": Entry("Neyman's chi-square, the integral of (p - q)^2 / p", _neyman),
    "hellinger2": Entry("squared Hellinger, the integral of (sqrt p - sqrt q)^2", _hellinger2),
    "jeffrey": Entry("Jeffrey, KL(P||Q) + KL(Q||P)", _jeffrey),
    "js": Entry("Jensen-Shannon, at most log 2", lambda: scaled(_gan(math.log(2)), 0.5)),
    "js2": Entry("twice Jensen-Shannon: what the f-GAN paper calls Jensen-Shannon", partial(_gan, math.log(2))),
    "jsw": Entry("weighted Jensen-Shannon, 0 < pi < 1 the weight of P", _jsw, {"pi": 0.3}),
    "gan": Entry("the GAN's own, js2 - log 4", _gan),
    "alpha": Entry("alpha: (u^a - 1 - a(u - 1)) / (a(a - 1)), -8 <= a <= 8, not 0 or 1", _alpha, {"alpha": 0.5}),
}


def divergence(text: str, what: str = "--divergence") -> Divergence:
    """The row of "kl", "jsw:pi=0.3", "alpha:alpha=-1". Raises UserError for what is unknown or out of range."""
    return look_up(what, text, DIVERGENCES)
