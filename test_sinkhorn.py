"""Optimal transport and the feedback unit, against oracles that share no code with the module.

Plans are compared with POT (`ot.sinkhorn` iterates, `ot.emd2` is the exact cost), ground costs
with scipy's cdist, KL with scipy's entropy. Every property holds at every number of iterations L
unless it says otherwise. Not tested because not true at L = 10: S >= 0, S(x,y) = S(y,x),
W >= emd, W monotone in eps.
"""
import math

import numpy as np
import ot
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.special import softmax
from scipy.stats import entropy

from encapnet import (
    FeedbackUnit,
    cosine_cost,
    kl_divergence,
    l2_cost,
    sinkhorn_divergence,
    sinkhorn_plan,
)

COSTS = {"cosine": cosine_cost, "l2": l2_cost}


def transport_cost(Q, P):
    return (Q * P).sum((-2, -1))
METRIC = {"cosine": "cosine", "l2": "euclidean"}                       # scipy's names
both_costs = pytest.mark.parametrize("cost", ["cosine", "l2"])
sizes, lengths, seeds = st.integers(1, 9), st.integers(1, 20), st.integers(0, 2**16)


def close(a, b, tol=1e-12):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tol, atol=tol,
                               check_dtype=False)


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def problems(draw):
    """(Q, eps, R, L): a cost with entries in [0, R], smooth or with nothing but 0 and R."""
    n, m, R = draw(sizes), draw(sizes), draw(st.sampled_from([0.01, 1.0, 2.0, 30.0]))
    U = torch.rand(n, m, generator=torch.Generator().manual_seed(draw(seeds))).double()
    Q = R * (U.round() if draw(st.booleans()) else U)
    return Q, R * draw(st.floats(1 / 50, 3)), R, draw(lengths)


@st.composite
def clouds(draw):
    """x (n, d), y (m, d), L"""
    n, m, d, seed = draw(sizes), draw(sizes), draw(st.integers(2, 6)), draw(seeds)
    return randn(seed, n, d), randn(seed + 1, m, d) + draw(st.floats(-1, 1)), draw(lengths)


# ----------------------------------------------------------------- oracles

def pot_plan(Q, eps, L):
    return ot.sinkhorn([], [], np.asarray(Q), eps, numItermax=L, stopThr=0, warn=False)


def ground(x, y, cost):
    return np.nan_to_num(cdist(x, y, METRIC[cost]), nan=1.0)            # cosine of a zero row: 1


def pot_divergence(x, y, eps, L, cost, bias_fix=True):
    """2 W(x,y) - W(x,x) - W(y,y), or W(x,y) alone, each W = <Q, P> after L iterations."""
    def W(x, y):
        Q = ground(x, y, cost)
        return (Q * pot_plan(Q, eps, L)).sum()
    return 2 * W(x, y) - W(x, x) - W(y, y) if bias_fix else W(x, y)


def emd_and_column_error(Q, P):
    """Exact transport cost, and the total variation between P's columns and 1/m."""
    emd = ot.emd2([], [], Q.numpy())
    return emd, (P.sum(0) - 1 / Q.shape[1]).abs().sum().item() / 2


# ----------------------------------------------------------------- the plan

@given(problems(), st.booleans())
def test_plan_has_the_iterates_of_pot(problem, kernel):
    Q, eps, R, L = problem
    close(sinkhorn_plan(Q, eps, L, q_max=R if kernel else None), pot_plan(Q, eps, L))


@given(problems(), st.booleans())
def test_rows_are_exact(problem, kernel):
    Q, eps, R, L = problem
    P = sinkhorn_plan(Q, eps, L, q_max=R if kernel else None)
    assert (P >= 0).all()
    close(P.sum(-1), torch.full_like(Q[:, 0], 1 / len(Q)))


@given(problems())
def test_column_error_never_grows(problem):
    Q, eps, _, _ = problem
    errors = [emd_and_column_error(Q, sinkhorn_plan(Q, eps, L))[1] for L in range(1, 12)]
    assert all(b <= a + 1e-13 for a, b in zip(errors, errors[1:], strict=False)), errors


@given(problems(), st.booleans(), st.randoms(use_true_random=False))
def test_plan_is_permutation_equivariant(problem, kernel, random):
    Q, eps, R, L = problem
    rows, columns = (random.sample(range(k), k) for k in Q.shape)
    q_max = R if kernel else None
    P = sinkhorn_plan(Q, eps, L, q_max)
    close(sinkhorn_plan(Q[rows][:, columns], eps, L, q_max), P[rows][:, columns])


@given(problems(), st.booleans())
def test_only_the_ratio_of_cost_and_eps_matters(problem, kernel):
    Q, eps, R, L = problem
    q_max = (R, 2 * R) if kernel else (None, None)
    assert torch.equal(sinkhorn_plan(2 * Q, 2 * eps, L, q_max[1]),       # powers of two: bitwise
                       sinkhorn_plan(Q, eps, L, q_max[0]))


@given(problems())
def test_cost_is_near_the_exact_one_at_every_length(problem):
    Q, eps, R, L = problem
    P = sinkhorn_plan(Q, eps, L)
    W, (emd, tv) = transport_cost(Q, P).item(), emd_and_column_error(Q, P)
    slack = 1e-9 * R
    assert emd - R * tv - slack <= W <= emd + R * tv + eps * math.log(min(Q.shape)) + slack


@pytest.mark.parametrize("n, m", [(6, 6), (5, 7)])
def test_cost_tends_to_the_exact_one_as_eps_falls(n, m):
    Q = torch.rand(n, m, generator=torch.Generator().manual_seed(0)).double()
    emd = ot.emd2([], [], Q.numpy())
    errors = [abs(transport_cost(Q, sinkhorn_plan(Q, eps, 3000)).item() - emd)
              for eps in (1, 0.1, 0.01, 0.003)]
    assert errors[0] > 0.05 and errors == sorted(errors, reverse=True) and errors[-1] < 1e-3


@given(st.integers(1, 3), sizes, sizes, seeds, st.sampled_from([None, 2]))
def test_leading_dimensions_equal_a_loop(k, n, m, seed, q_max):
    Q = randn(seed, 2, k, n, m).sigmoid() * 2
    P = sinkhorn_plan(Q, 0.1, 10, q_max)
    W = transport_cost(Q, P)
    assert W.shape == (2, k)
    for a in range(2):
        for b in range(k):
            close(P[a, b], pot_plan(Q[a, b], 0.1, 10))
            close(W[a, b], (Q[a, b] * P[a, b]).sum())


def test_a_cost_may_lie_in_memory_as_it_likes():
    Q = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    turned = Q.permute(1, 0, 3, 2)                                      # no view has other sizes
    close(sinkhorn_plan(turned, q_max=2.0), sinkhorn_plan(turned.contiguous(), q_max=2.0))


@pytest.mark.parametrize("m", [5, 7])
def test_a_divergence_is_exported_for_any_number_of_clouds(m):
    class Divergence(nn.Module):
        def forward(self, x, y):
            return sinkhorn_divergence(x, y)
    x, y, many = randn(0, 6, 5, 3), randn(1, 6, m, 3), {0: torch.export.Dim("clouds")}
    program = torch.export.export(Divergence(), (x[:4], y[:4]), dynamic_shapes=(many, many))
    close(program.module()(x, y), sinkhorn_divergence(x, y))


@given(st.integers(2, 40), st.integers(2, 40), seeds, st.integers(1, 100),
       st.sampled_from([1 / 300, 0.02, 2 / 60, 0.1, 1]))
def test_plan_in_float32(n, m, seed, L, eps):
    """The worst costs, nothing but 0 and 2: the kernel is exp(-60) at eps = 2/60, 0 far below,
    where a stated bound must not force the kernel form."""
    Q = 2 * (randn(seed, n, m) > 0.5).double()
    want = sinkhorn_plan(Q, eps, L)
    for q_max in (2, None):
        got = sinkhorn_plan(Q.float(), eps, L, q_max)
        assert got.dtype == torch.float32
        close(got.double() * n * m, want * n * m, 2e-4 * m)


@pytest.mark.parametrize("eps, q_max", [(0.3, None), (0.3, 2.0), (0.02, 2.0)])
def test_plan_gradcheck(eps, q_max):
    Q = (randn(0, 2, 3, 4).sigmoid() * 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda Q: sinkhorn_plan(Q, eps, 4, q_max), Q)


@given(problems())
def test_gradient_of_the_cost_is_the_detached_plan(problem):
    Q, eps, _, L = problem
    P = sinkhorn_plan(Q, eps, L)
    Q.requires_grad_()
    transport_cost(Q, P).backward()
    assert torch.equal(Q.grad, P)


# ----------------------------------------------------------------- ground costs

@both_costs
@given(clouds(), st.booleans())
def test_cost_equals_scipy(cost, cloud, zero_row):
    x, y, _ = cloud
    x[0] *= not zero_row
    close(COSTS[cost](x, y), ground(x, y, cost))
    batched = COSTS[cost](torch.stack([y, 2 * x[:1].expand_as(y)]), torch.stack([y, y]))
    close(batched[1], ground(2 * x[:1].expand_as(y), y, cost))


def test_l2_gradient_far_from_the_origin_with_a_zero_diagonal():
    """d/dx sum |x_i - x_k| = 2 sum_k (x_i - x_k) / |x_i - x_k|, the diagonal giving nothing."""
    x = randn(0, 30, 3) + 1e4                       # from 26 rows cdist would expand the square
    d, r = x.numpy()[:, None] - x.numpy(), cdist(x, x)
    np.fill_diagonal(r, 1)
    Q = l2_cost(x.requires_grad_(), x)
    Q.sum().backward()
    assert (Q.diagonal() == 0).all()
    close(x.grad, 2 * (d / r[..., None]).sum(1))


@both_costs
@pytest.mark.parametrize("plan_grad", [False, True])
def test_gradients_are_finite_at_zero_and_equal_rows(cost, plan_grad):
    x, y = randn(0, 6, 3).relu(), randn(1, 5, 3).relu()          # ReLU features: zeros are common
    x[2], y[1], y[3] = 0, 0, x[0]
    x.requires_grad_(), y.requires_grad_()
    S = sinkhorn_divergence(x, y, cost=cost, plan_grad=plan_grad)
    S.backward()
    assert all(t.isfinite().all() for t in (S, x.grad, y.grad))
    assert x.grad.abs().sum() > 0 and y.grad.abs().sum() > 0


# ----------------------------------------------------------------- the divergence

@both_costs
@given(clouds(), st.floats(0.02, 2), st.booleans())
def test_divergence_equals_pot(cost, cloud, eps, bias_fix):
    x, y, L = cloud
    got = sinkhorn_divergence(x, y, eps, L, cost, bias_fix)
    close(got, pot_divergence(x, y, eps, L, cost, bias_fix), 1e-11)


def test_defaults_and_pots_halved_convention():
    """POT: W(x,y) - (W(x,x) + W(y,y)) / 2, cut at 0; geomloss halves likewise, with the entropy
    counted in W. The paper's Eq. (11) is twice that, with the sharp W = <Q, P> as in POT."""
    x, y = randn(0, 7, 3), randn(1, 5, 3) + 1
    half = ot.bregman.empirical_sinkhorn_divergence(
        x.numpy(), y.numpy(), reg=0.1, numIterMax=10, stopThr=0, metric="cosine", warn=False)
    assert half > 0.1
    close(sinkhorn_divergence(x, y), 2 * half)
    Q = cosine_cost(x, y)
    close(sinkhorn_plan(Q), pot_plan(Q, 0.1, 10))


def test_the_cosine_cost_takes_the_kernel_form_where_it_is_safe():
    """To the last bit of float32, in which the two forms differ: eps from 2 / 60 on."""
    x, y = randn(0, 9, 64, 3).float(), randn(1, 9, 64, 3).float()
    Q = cosine_cost(x, y)
    for eps, form in ((0.1, 2.0), (2 / 60, 2.0), (0.03, None)):
        W = {q_max: transport_cost(Q, sinkhorn_plan(Q, eps, q_max=q_max)) for q_max in (2.0, None)}
        got = sinkhorn_divergence(x, y, eps, bias_fix=False)
        assert torch.equal(got, W[form])
        assert torch.equal(W[2.0], W[None]) == (form is None)


@pytest.mark.parametrize("eps", [1, 0.1, 0.02, 0.01, 0.001])
def test_opposite_directions_are_4_apart(eps):
    """In float32 too, where exp(-2 / 0.01) is 0: then the log form has to be chosen."""
    x = torch.tensor([[3.0, 4.0]])
    close(sinkhorn_divergence(x, -x, eps), 4.0, 1e-6)


@both_costs
@given(clouds(), st.floats(0.02, 2), st.randoms(use_true_random=False))
def test_divergence_of_a_set_with_itself_is_zero(cost, cloud, eps, random):
    x, _, L = cloud
    shuffled = x[random.sample(range(len(x)), len(x))]                # a set has no order
    close(sinkhorn_divergence(x, shuffled, eps, L, cost), 0.0, 1e-11)


@given(clouds(), st.floats(0.05, 2), seeds)
def test_what_each_cost_cannot_see(cloud, eps, seed):
    """The cosine: lengths and common rotations. l2: common rigid motions; it scales with eps."""
    x, y, L = cloud
    turn = torch.linalg.qr(randn(seed, x.shape[1], x.shape[1]))[0]
    S = sinkhorn_divergence(x, y, eps, L)
    close(sinkhorn_divergence(3 * x @ turn, y @ turn / 7, eps, L), S, 1e-10)
    S = sinkhorn_divergence(x, y, eps, L, "l2")
    close(sinkhorn_divergence(x @ turn + 1, y @ turn + 1, eps, L, "l2"), S, 1e-10)
    close(sinkhorn_divergence(3 * x, 3 * y, 3 * eps, L, "l2"), 3 * S, 1e-10)


@both_costs
@given(clouds())
def test_large_eps_is_the_mmd(cost, cloud):
    x, y, L = cloud
    mean = [cdist(a, b, METRIC[cost]).mean() for a, b in ((x, y), (x, x), (y, y))]
    got = sinkhorn_divergence(x, y, 1e8, L, cost)
    close(got, 2 * mean[0] - mean[1] - mean[2], 1e-6)


@both_costs
@pytest.mark.parametrize("m", [5, 7])
def test_divergence_of_batches_equals_a_loop(cost, m):
    x, y = randn(0, 2, 3, 5, 4), randn(1, 2, 3, m, 4)
    got = sinkhorn_divergence(x, y, cost=cost)
    want = [[pot_divergence(x[a, b], y[a, b], 0.1, 10, cost) for b in range(3)] for a in range(2)]
    close(got, torch.tensor(want, dtype=torch.float64))


def frozen_plan_gradient(x, y, eps, L, cost, bias_fix):
    """Gradient of the divergence where POT's plans are constants; costs by torch."""
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()

    def W(a, b):
        Q = (1 - F.cosine_similarity(a[:, None], b, dim=-1) if cost == "cosine"
             else torch.linalg.vector_norm(a[:, None] - b, dim=-1))
        return (Q * torch.as_tensor(pot_plan(Q.detach(), eps, L))).sum()
    S = 2 * W(x, y) - W(x, x) - W(y, y) if bias_fix else W(x, y)
    return torch.autograd.grad(S, (x, y))


@both_costs
@pytest.mark.parametrize("bias_fix", [True, False])
@given(cloud=clouds(), eps=st.floats(0.05, 1))
def test_gradient_with_a_detached_plan(cost, bias_fix, cloud, eps):
    x, y, L = cloud
    want = frozen_plan_gradient(x, y, eps, L, cost, bias_fix)
    x.requires_grad_(), y.requires_grad_()
    S = sinkhorn_divergence(x, y, eps, L, cost, bias_fix)
    for got, w in zip(torch.autograd.grad(S, (x, y)), want, strict=True):
        close(got, w, 1e-10)


@both_costs
@pytest.mark.parametrize("bias_fix", [True, False])
@pytest.mark.parametrize("eps, m", [(0.3, 4), (0.3, 3), (0.02, 3)])
def test_gradcheck_through_the_plan(cost, bias_fix, eps, m):
    x, y = randn(0, 3, 2).requires_grad_(), randn(1, m, 2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, y: sinkhorn_divergence(x, y, eps, 4, cost, bias_fix, plan_grad=True), (x, y))


# ----------------------------------------------------------------- precision

def value_and_gradients(x, y, autocast=None, **options):
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        S = sinkhorn_divergence(x, y, **options)
    S.backward()
    return S.detach(), x.grad, y.grad


@both_costs
@pytest.mark.parametrize("eps", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("plan_grad", [False, True])
def test_float32_follows_float64(cost, eps, plan_grad):
    x, y = randn(0, 16, 8).float(), randn(1, 12, 8).float()
    options = dict(eps=eps, cost=cost, plan_grad=plan_grad)
    single = value_and_gradients(x, y, **options)
    double = value_and_gradients(x.double(), y.double(), **options)
    assert all(t.dtype == torch.float32 for t in single)
    for got, want in zip(single, double, strict=True):
        close(got, want, 2e-5)


@both_costs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_upcast_first(cost, dtype):
    x, y = (300 * randn(0, 16, 8)).to(dtype), (300 * randn(1, 12, 8)).to(dtype)   # 300^2 > 65504
    S, dx, _ = value_and_gradients(x, y, cost=cost)
    want, want_dx, _ = value_and_gradients(x.float(), y.float(), cost=cost)
    assert S.dtype == torch.float32 and torch.equal(S, want)
    assert dx.dtype == dtype and torch.equal(dx, want_dx.to(dtype))
    assert torch.equal(COSTS[cost](x, y), COSTS[cost](x.float(), y.float()))


@both_costs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [16, 12])
def test_autocast_is_switched_off_inside(cost, dtype, m):
    x, y = randn(0, 16, 8).float(), randn(1, m, 8).float()
    Q = COSTS[cost](x, y)
    got = value_and_gradients(x, y, dtype, cost=cost, plan_grad=True)
    want = value_and_gradients(x, y, cost=cost, plan_grad=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with torch.autocast("cpu", dtype):
        assert torch.equal(sinkhorn_plan(Q.to(dtype), 1.0, q_max=20.0),
                           sinkhorn_plan(Q.to(dtype).float(), 1.0, q_max=20.0))


# ----------------------------------------------------------------- KL

@given(sizes, st.integers(2, 20), seeds, st.sampled_from([1, 100]))
def test_kl_equals_scipy(batch, features, seed, scale):
    real, generated = randn(seed, batch, features) * scale, randn(seed + 1, batch, features)
    want = entropy(softmax(real.numpy(), 1), softmax(generated.numpy(), 1), axis=1).mean()
    close(kl_divergence(real, generated), want, 1e-9)


def test_kl_gradients_reach_both_sides():
    real, generated = randn(0, 3, 5).requires_grad_(), randn(1, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(kl_divergence, (real, generated))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kl_of_half_precision_is_taken_in_float32(dtype):
    x, y = randn(0, 8, 40).to(dtype), randn(1, 8, 40).to(dtype)
    with torch.autocast("cpu", dtype):
        got = kl_divergence(x, y)
    assert got.dtype == torch.float32 and torch.equal(got, kl_divergence(x.float(), y.float()))


# ----------------------------------------------------------------- the feedback unit

def unit_and_images(low=8, high=16, types=4, stride=2, size=8, batch=6, **options):
    """A unit in float64, a lower image (batch, low, size, size) and the higher one."""
    unit = FeedbackUnit(low, high, types, stride, **options).double()
    small = -(-size // stride)
    return (unit, randn(0, batch, low, size, size).abs() / 4,
            randn(1, batch, high, small, small).abs() / 4)


def batch_norm(z):
    return (z - z.mean((0, 2, 3), True)) / (z.var((0, 2, 3), False, True) + 1e-5).sqrt()


def layers(unit, kind):
    return [m for m in unit.modules() if isinstance(m, kind)]


@given(types=st.integers(1, 4), dims=st.tuples(st.integers(1, 3), st.integers(1, 3)),
       stride=st.integers(1, 2), size=st.integers(3, 9), batch=st.integers(2, 4),
       generator=st.sampled_from(["capsule", "vanilla"]))
def test_unit_shapes(types, dims, stride, size, batch, generator):
    unit, u, v = unit_and_images(types * dims[0], types * dims[1], types, stride, size, batch,
                                 generator=generator)
    real, generated = unit.features(u, v)
    assert unit.generate(v, u.shape[-2:]).shape == u.shape
    assert real.shape == generated.shape and len(real) == batch and real.shape[1] > 1
    assert unit(u, v).shape == ()


@pytest.mark.parametrize("low, size, features", [
    (32, 32, 64), (128, 8, 4),
    (512, 4, 4),                     # M4's second unit: at stride 2 one ReLU number would be left
    (64, 2, 4)])                     # the same unit for images of 16x16
def test_extractor_never_leaves_a_single_number(low, size, features):
    unit, u, v = unit_and_images(low, low, 32, 1, size, batch=2)
    assert unit.features(u, v)[0].shape == (2, features)


@pytest.mark.parametrize("stride, size", [(1, 8), (2, 8), (2, 7)])
@pytest.mark.parametrize("generator", ["capsule", "vanilla"])
def test_generator_equals_its_formula(stride, size, generator):
    unit, u, v = unit_and_images(stride=stride, size=size, generator=generator)
    (deconv,) = layers(unit, nn.ConvTranspose2d)
    capsule = generator == "capsule"
    s = F.conv_transpose2d(v, deconv.weight, deconv.bias, stride, 1, size - 1 - stride * (
        v.shape[-1] - 1), groups=4 if capsule else 1)
    want = batch_norm(s).relu().unflatten(1, (4, 2))
    if capsule:                                           # s |s| / (1 + |s|^2), type by type
        n = want.norm(dim=2, keepdim=True)
        want = want * n / (1 + n ** 2)
    got = unit.generate(v, u.shape[-2:])
    close(got, want.flatten(1, 2))
    assert deconv.kernel_size == (3, 3)
    assert (got.unflatten(1, (4, 2)).norm(dim=2).max() < 1) == capsule


@pytest.mark.parametrize("generator", ["capsule", "vanilla"])
@pytest.mark.parametrize("kind", range(4))
def test_a_generated_capsule_sees_its_own_type_only(generator, kind):
    unit, u, v = unit_and_images(generator=generator)
    w = v.clone()
    w.unflatten(1, (4, 4))[:, kind] += randn(2, 6, 4, 4, 4)
    change = unit.generate(w, u.shape[-2:]) - unit.generate(v, u.shape[-2:])
    moved = change.unflatten(1, (4, 2)).abs().amax((0, 2, 3, 4)) > 1e-9
    assert moved.tolist() == [generator == "vanilla" or t == kind for t in range(4)]


@pytest.mark.parametrize("size, stride", [(16, 2), (6, 2), (4, 1)])    # 1 where one number is left
def test_extractor_runs_once_over_both_images(size, stride):
    """One batch of both, so both meet the same statistics; BatchNorm counts one step a call."""
    unit, u, v = unit_and_images(size=size)
    first, second = layers(unit, nn.Conv2d)
    assert (first.in_channels, first.out_channels, second.out_channels) == (8, 2, 1)
    z = torch.cat([u, unit.generate(v, u.shape[-2:])])
    z = batch_norm(F.conv2d(z, first.weight, first.bias, 2, 1)).relu()
    z = batch_norm(F.conv2d(z, second.weight, second.bias, stride, 1)).relu()
    for got, want in zip(unit.features(u, v), z.flatten(1).chunk(2), strict=True):
        close(got, want)
    norms = layers(unit, nn.BatchNorm2d)
    before = [n.num_batches_tracked.item() for n in norms]
    unit(u, v)
    assert [n.num_batches_tracked.item() - b for n, b in zip(norms, before, strict=True)] == [1] * 3


@pytest.mark.parametrize("options", [
    dict(), dict(bias_fix=False), dict(cost="l2"), dict(cost="l2", bias_fix=False),
    dict(plan_grad=True), dict(eps=0.5), dict(eps=0.01), dict(iterations=3)], ids=str)
@pytest.mark.parametrize("extractor", [True, False])
def test_unit_is_the_divergence_of_its_features(options, extractor):
    """x is the generated image and y the real one: at finite L the order matters."""
    unit, u, v = unit_and_images(extractor=extractor, **options)
    u.requires_grad_(), v.requires_grad_()
    y, x = unit.features(u, v)
    if not extractor:
        assert torch.equal(y, u.flatten(1))
        close(x, unit.generate(v, u.shape[-2:]).flatten(1))
    want = sinkhorn_divergence(x, y, **options)
    close(unit(u, v), want)
    for a, b in zip(torch.autograd.grad(unit(u, v), (u, v)),
                    torch.autograd.grad(want, (u, v), retain_graph=True), strict=True):
        close(a, b, 1e-10)


def test_unit_with_kl():
    unit, u, v = unit_and_images(divergence="kl")
    real, generated = (softmax(f.detach().numpy(), 1) for f in unit.features(u, v))
    close(unit(u, v), entropy(real, generated, axis=1).mean())


@pytest.mark.parametrize("options", [
    dict(), dict(bias_fix=False), dict(eps=0.5, iterations=2), dict(cost="l2")], ids=str)
@pytest.mark.parametrize("shape", [dict(), dict(low=16, high=16, stride=1),
                                   dict(low=32, high=64, size=4)], ids=str)
def test_unit_equals_pot(options, shape):
    """Units that differ in channels, stride and size."""
    unit, u, v = unit_and_images(**shape, **options)
    real, generated = (f.detach().numpy() for f in unit.features(u, v))
    want = pot_divergence(generated, real, options.get("eps", 0.1), options.get("iterations", 10),
                          options.get("cost", "cosine"), options.get("bias_fix", True))
    close(unit(u, v), want, 1e-11)


@pytest.mark.parametrize("plan_grad", [False, True])
def test_features_that_share_their_one_positive_position_are_a_trivial_minimum(plan_grad):
    """Two different batches, divergence 0, gradient 0: from there on no image is moved."""
    unit, u, v = unit_and_images(extractor=False, plan_grad=plan_grad)
    u.requires_grad_(), v.requires_grad_()
    place = F.one_hot(torch.tensor(37), u[0].numel())
    unit.extract = lambda image: (1 + image.flatten(1)) * place
    real, generated = unit.features(u, v)
    assert (real.sum(1) > 0).all() and (real - generated).abs().max() > 0.01
    S = unit(u, v)
    S.backward()
    close(S, 0.0)
    close(u.grad, torch.zeros_like(u))
    close(v.grad, torch.zeros_like(v))


@pytest.mark.parametrize("options", [
    dict(), dict(plan_grad=True), dict(cost="l2"), dict(bias_fix=False), dict(divergence="kl"),
    dict(extractor=False), dict(extractor=False, divergence="kl"), dict(generator="vanilla"),
    dict(low=64, high=128, types=7, generator="vanilla"),                # a ResNet has no types
    dict(low=64, high=64, types=7, stride=1, generator="vanilla")], ids=str)
def test_gradients_reach_both_images_and_every_parameter(options):
    unit, u, v = unit_and_images(size=16, batch=8, **options)
    unit(u.requires_grad_(), v.requires_grad_()).backward()
    for name, t in [("low", u), ("high", v), *unit.named_parameters()]:
        assert t.grad is not None and t.grad.isfinite().all() and t.grad.abs().sum() > 0, name


def test_unit_under_autocast_keeps_the_divergence_in_float32():
    unit, u, v = unit_and_images(size=16)
    unit, u, v = unit.float(), u.float(), v.float()
    with torch.autocast("cpu", torch.bfloat16):
        real, generated = unit.features(u, v)
        S = unit(u, v)
    assert S.dtype == torch.float32
    assert torch.equal(S, sinkhorn_divergence(generated.float(), real.float()))


# ----------------------------------------------------------------- errors

x43, u64, v64 = torch.zeros(4, 3), torch.zeros(2, 64, 4, 4), torch.zeros(2, 64, 2, 2)


@pytest.mark.parametrize("words, call", [
    ("eps -0.5", lambda: sinkhorn_plan(x43, eps=-0.5)),
    ("eps nan", lambda: sinkhorn_plan(x43, eps=math.nan)),
    ("iterations 0", lambda: sinkhorn_plan(x43, iterations=0)),
    ("eps 0", lambda: sinkhorn_divergence(x43, x43, eps=0)),
    ("iterations -1", lambda: sinkhorn_divergence(x43, x43, iterations=-1)),
    ("cost l1 cosine l2", lambda: sinkhorn_divergence(x43, x43, cost="l1")),
    ("generated F=3 2", lambda: kl_divergence(x43, x43[:, :1].expand(4, 2))),
    ("generated F=3 1", lambda: kl_divergence(x43, x43[:, :1])),         # would broadcast
    ("divergence js ot kl", lambda: FeedbackUnit(64, 64, divergence="js")),
    ("cost l1 cosine l2", lambda: FeedbackUnit(64, 64, cost="l1")),
    ("generator gan capsule vanilla", lambda: FeedbackUnit(64, 64, generator="gan")),
    ("eps 0", lambda: FeedbackUnit(64, 64, eps=0)),
    ("iterations 0", lambda: FeedbackUnit(64, 64, iterations=0)),
    ("high B=2 1", lambda: FeedbackUnit(64, 64)(u64, v64[:1]))])         # halves would mix
def test_a_wrong_argument_is_named(words, call):
    """The message holds the argument, its value and what is allowed."""
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words.split()), str(error.value)


@pytest.mark.parametrize("words, call", [
    ("1-D", lambda: sinkhorn_divergence(x43[0], x43)),                   # one sample, not a cloud
    ("0", lambda: sinkhorn_divergence(x43, x43[:0])),
    ("4x3 2x4", lambda: sinkhorn_divergence(x43, x43[:, :2])),
    ("3 2", lambda: sinkhorn_divergence(x43, x43[:, :2], cost="l2")),
    ("out_channels groups", lambda: FeedbackUnit(60, 64)),
    ("in_channels groups", lambda: FeedbackUnit(64, 60)),
    ("32 64", lambda: FeedbackUnit(64, 64)(u64[:, :32], v64)),
    ("32 64", lambda: FeedbackUnit(64, 64)(u64, v64[:, :32])),
    ("[4, 4] [7, 7]", lambda: FeedbackUnit(64, 64)(u64, u64))])          # not half of low's 4
def test_where_pytorch_names_the_sizes_its_error_will_do(words, call):
    with pytest.raises((ValueError, RuntimeError)) as error:
        call()
    assert all(word in str(error.value) for word in words.split()), str(error.value)
