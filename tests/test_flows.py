"""Flows: their formulas against numbers worked out elsewhere, their determinants against autograd, their inverses."""

import pytest
import torch

from gan.vae.flows import FLOWS, gated, householder, planar

D, FEATURES = 5, 3


def exact(*rows):
    return torch.tensor(rows if len(rows) > 1 else rows[0], dtype=torch.float64)


def test_planar_of_a_known_case():
    z, log_det = planar(exact(0.4, -0.7), exact(1.2, -2.5), exact(0.8, 1.1), exact(0.3))
    torch.testing.assert_close(z, exact(0.16053477841767547, -0.41139179013892685))
    assert log_det.item() == pytest.approx(-1.753617918160744, abs=1e-12)


def test_planar_that_contracts_as_much_as_it_can():
    """At z = 0, b = 0 the determinant is softplus(w·u) = log(1 + e^-25), which 1 plus a product cannot be."""
    z, log_det = planar(torch.zeros(2), -torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0]), torch.tensor(0.0))
    assert z.tolist() == [0, 0] and log_det.item() == pytest.approx(-25)
    draws = torch.randn(3, 100_000, 4, generator=torch.Generator().manual_seed(0))
    assert planar(draws[0] / 10, -2 * draws[1], 2 * draws[1], torch.zeros(100_000))[1].isfinite().all()


def test_planar_without_a_direction_changes_nothing():
    z, log_det = planar(exact(0.4, -0.7), exact(1.2, -2.5), exact(0.0, 0.0), exact(0.0))
    assert z.tolist() == [0.4, -0.7] and log_det.item() == 0


def test_householder_of_a_known_case():
    z = householder(exact(0.5, -1.0, 2.0), exact(1.0, 2.0, -1.0))
    torch.testing.assert_close(z, exact(1.6666666666666665, 1.3333333333333333, 0.8333333333333335))


def test_gates_of_a_known_case():
    z, log_det = gated(exact(0.3, 1.1), exact(0.2, -0.4), exact(1.0, 2.0))
    torch.testing.assert_close(z, exact(0.2731058578630005, 0.9211956169668235))
    assert log_det.item() == pytest.approx(-0.44018969856119544, abs=1e-12)


@pytest.fixture(params=FLOWS)
def flow(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = FLOWS[request.param](FEATURES, D).double()
        for p in layer.parameters():
            torch.nn.init.normal_(p, std=0.3)
        return layer, torch.randn(2, 4, D, dtype=torch.float64), torch.randn(4, FEATURES, dtype=torch.float64)


def test_the_determinant_is_that_of_the_jacobian(flow):
    layer, z, h = flow
    new, log_det = layer(z, h)
    assert new.shape == z.shape and log_det.shape == z.shape[:2]
    for k in range(2):
        for n in range(4):
            jacobian = torch.autograd.functional.jacobian(
                lambda x, n=n: layer(x.view(1, 1, D), h[n : n + 1])[0], z[k, n]
            )
            expected = torch.linalg.slogdet(jacobian.view(D, D)).logabsdet
            torch.testing.assert_close(log_det[k, n], expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", FLOWS)
def test_new_layers_do_nearly_the_same_to_all_images(name):
    torch.manual_seed(0)
    z = torch.randn(1, 1, 16).expand(1, 200, 16)
    h = torch.randn(200, 64)
    with torch.no_grad():
        for _ in range(4):
            z, _ = FLOWS[name](64, 16)(z, h)
    assert z.std(1).mean() < 0.15 * z.square().mean().sqrt()


def test_the_inverse_undoes_it(flow):
    layer, z, h = flow
    if not hasattr(layer, "inverse"):
        pytest.skip("has no inverse in closed form")
    new, log_det = layer(z, h)
    assert not torch.allclose(new, z, atol=0.01)
    old, again = layer.inverse(new, h)
    torch.testing.assert_close(old, z, atol=1e-8, rtol=0)
    torch.testing.assert_close(again, log_det, atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", FLOWS)
def test_a_step_of_adam_changes_all_weights_by_a_small_share_of_themselves(name):
    torch.manual_seed(0)
    layer = FLOWS[name](64, 16)
    linear = [m for m in layer.modules() if isinstance(getattr(m, "weight", None), torch.Tensor) and m.weight.any()]
    assert linear
    before = [module.weight.detach().clone() * getattr(module, "scale", 1.0) for module in linear]
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.004)
    for _ in range(2):  # the first reaches only the last of layers that begin at 0
        z, log_det = layer(torch.randn(2, 8, 16), torch.randn(8, 64))
        (z.square().sum() - log_det.sum()).backward()
        optimizer.step()
    for module, old in zip(linear, before, strict=True):
        change = module.weight.detach() * getattr(module, "scale", 1.0) - old
        assert 0 < change.square().mean() < 0.1**2 * old.square().mean()
