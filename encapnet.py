"""Neural Network Encapsulation (Li, Guo, Dai, Ouyang, Wang; ECCV 2018, arXiv:1808.03749).

A neuron says with one number that something is there.  A *capsule* is a small vector: its length
says whether the thing is there, its direction what it is like.  A layer of capsules guesses at the
next: every lower capsule u_i is mapped by a matrix to its *vote* v_hat_j|i for what each higher
capsule j should look like.  Where votes for j agree, a whole has been found of parts that fit; so
votes that agree are believed more, j is computed again from them, and so on for a few rounds.
That is *routing by agreement* (dynamic_routing), or, with a Gaussian fitted to the votes instead of
a mean, *EM routing* (em_routing).  Its price: n lower and n higher capsules have n^2 votes.

The paper replaces the rounds by one supervised pass, *capConv*: a higher capsule hears the lower
ones of its own type through a master branch, all others through an aide branch, and two small
convolutions compute how much each counts.  And it asks in training that a layer can be told from
the one above: a *feedback unit* generates the lower image from the higher one, and an optimal
transport divergence compares a batch of generated images with the real batch.

Axes    B batch · i / j lower / higher capsule, n_in / n_out of them · d numbers of a capsule, e of
        a lower one where both occur · G capsule types · P positions · H W space · K classes
        on transport: x y samples of a batch · n m sizes of two point clouds · there P is the plan,
        K a kernel, a b weights of x y
Layout  a capsule image is (B, G*d, H, W), type-major: `groups=G` gives each type its own transform

Where each equation lives
    Sec. 2.1    squash ............... squash            Eq. (8)   <Q, P> ....... transport_cost
    Eq. (1)     dynamic routing ...... dynamic_routing   Eq. (9)   a, b ......... sinkhorn_plan
    Eqs. (2,3)  EM routing ........... em_routing        Eq. (10)  P ............ sinkhorn_plan
    Eq. (4)     sum_i c_ij w_ij u_i .. RoutedCapsules    Eq. (11)  divergence ... debias
    Eqs. (5,6)  m1 v1 + m2 v2 ........ CapConv           App. B    g, f ......... FeedbackUnit
    Sec. 3.1    capFC ................ CapFC             Table 2   networks ..... EncapNet, ResNet

Deviations from the print or the released code, and readings, explained where the code is
    1  columns of the plan first ..... sinkhorn_plan     6  skips, coefficients from 1 .. CapConv
    2  aide of 3x3, own type out ..... CapConv           7  softmaxed features .... kl_divergence
    3  generator a type, extractor ... FeedbackUnit      8  scale of weights ..... RoutedCapsules
    4  softmax over i ................ dynamic_routing   9  stem, vanilla generator .... EncapNet
    5  EM standardised over j ........ em_routing       10  EM's activations, scores ....... CapNet
"""
import inspect
import math
from functools import partial, wraps
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

# ---- Small tools: arguments that are checked, and arithmetic that half precision would spoil -----

def check_choice(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}")


def check_positive(kind=int, **arguments):
    """Numbers, or tuples of them."""
    for name, value in arguments.items():
        for x in value if isinstance(value, (tuple, list)) else [value]:
            right_kind = isinstance(x, (int, kind)) and not isinstance(x, bool)
            if not (right_kind and 0 < x < math.inf):
                raise ValueError(f"{name}={value!r}: must be a positive {kind.__name__}")


def check_shape(name, x, axes, **sizes):
    """x has these axes, "B K", of the sizes given."""
    axes = axes.split()
    if len(axes) != x.dim() or any(sizes.get(axis, size) != size
                                   for axis, size in zip(axes, x.shape, strict=True)):
        raise ValueError(f"{name} has shape {tuple(x.shape)}: must be ({', '.join(axes)}) "
                         + ", ".join(f"{axis}={size}" for axis, size in sizes.items()))


def full_precision(function):
    """Decorator: half-precision tensors arrive as float32 and autocast is off inside."""
    def upcast(x):
        half = isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16)
        return x.float() if half else x

    @wraps(function)
    def wrapped(*args, **kwargs):
        first = args[0] if args else next(iter(kwargs.values()))
        with torch.autocast(first.device.type, enabled=False):
            return function(*map(upcast, args),
                            **{name: upcast(value) for name, value in kwargs.items()})
    return wrapped


def squash(s, dim=-1):
    """Shrink a vector to a length below 1 and keep its direction.   [Sec. 2.1]

    v = |s|^2 / (1 + |s|^2) * s / |s| = s |s| / (1 + |s|^2);  finite value and gradient at s = 0.
    s: any shape, capsules along `dim` -> the same shape and dtype
    """
    wide = s.float() if s.dtype in (torch.float16, torch.bfloat16) else s  # |s|^2 overflows in half
    square = wide.square().sum(dim, keepdim=True)                        # |s|^2
    length = square.clamp_min(torch.finfo(wide.dtype).tiny).sqrt()       # gradient 0 at s = 0
    return (wide * (length / (1 + square))).to(s.dtype)


# ---- The two classic routings on explicit votes: the readable definition -------------------------
# A higher capsule is computed from the votes of all lower ones, weighed by how well each agrees
# with it.  Both are unknown at first, so they are improved in turn: dynamic routing takes a
# weighted mean and measures agreement by the inner product; EM routing fits a Gaussian to the votes
# and measures it by the log density.

def dynamic_routing(votes, iterations=3, softmax="in", b0=None, return_coefficients=False):
    """Routing by agreement: votes that agree with the mean vote gain weight.   [Eqs. (1), (4)]

    votes: (B, i, j, d), v_hat_j|i;  b0: initial logits, broadcast to (B, i, j), or None
    softmax: "in" normalises c over i, "out" over j as Sabour et al. do, with which the authors'
        loss did not converge (reading 4, App. A.i)
    -> v (B, j, d), lengths in [0, 1);  with return_coefficients also c (B, i, j) of the last round
    """
    check_positive(iterations=iterations)
    check_choice("softmax", softmax, ("in", "out"))
    b = votes.new_zeros(()) if b0 is None else b0
    b = b.expand(votes.shape[:3])                                        # (B, i, j)
    for r in range(iterations):
        c = b.softmax(dim=1 if softmax == "in" else 2)                   # (B, i, j)
        s = torch.einsum("bij,bijd->bjd", c, votes)                      # Eq. (4)
        v = squash(s)                                                    # (B, j, d)
        if r < iterations - 1:
            b = b + torch.einsum("bijd,bjd->bij", votes, v)              # Eq. (1)
    return (v, c) if return_coefficients else v


def standardise(x):
    """Zero mean and unit variance over the last axis; all equal: 0.   [App. A.i]

    Deviation 5.  App. A.i calls a normalisation before the sigmoid crucial and gives no formula;
    that of the log densities is ours.  Cost and log density are sums over the d numbers of a pose,
    compared between capsules j.  As they are they differ by tens: the softmax gives each vote to
    one capsule; one left with two votes has almost no variance, so that its next log densities
    differ by more still, and three iterations hardly learn.  Standardised, both stay of order 1.
    """
    # layer_norm computes x / std - mean / std, which cancels where |mean| >> std: shift first.
    x = x - x.detach().amax(-1, keepdim=True)
    return F.layer_norm(x, x.shape[-1:], eps=1e-10)                      # eps: on the variance


def em_activation(log_mass, var, beta_v, beta_a, r):
    """Log activation of higher capsules, from the cost of the votes they explain.   [Eq. (2)]

    log_mass: (B, j), log sum_i R_ij a_i;  var: (B, j, d);  beta_v, beta_a: (j,);  r: iteration
    -> (B, j)
    """
    # Standardising ignores a factor, but for its eps: with the largest mass 1 that is as small for
    # inputs that are nearly off as for active ones.
    mass = (log_mass - log_mass.amax(-1, keepdim=True)).exp()
    cost = mass * (beta_v[:, None] + var.log() / 2).sum(-1)           # sum over d
    return F.logsigmoid((1 + r) * (beta_a - standardise(cost)))


def em_assignment(log_p, log_aj, normalise):
    """E-step: log R_ij, the share of vote i that higher capsule j explains.   [Eq. (3)]

    log_p: (..., j), log density of a vote under each cluster;  log_aj: log activations -> (..., j)
    """
    if normalise == "both":
        log_p = standardise(log_p)                                       # a sum over d is sharp
    return (log_aj + log_p).log_softmax(-1)


@full_precision
def em_routing(votes, activation, beta_v, beta_a, iterations=3, return_coefficients=False,
               normalise="both"):
    """Fit one Gaussian a higher capsule to the votes, by expectation maximisation.  [Eqs. (2), (3)]

    votes: (B, i, j, d);  activation: (B, i), in [0, 1];  beta_v, beta_a: (j,)
    -> pose (B, j, d), the means;  activation (B, j), in (0, 1)
       with return_coefficients also R (B, i, j), the assignment that the last M-step used
    normalise: what is standardised over j, "both" cost and log densities or "cost" alone, which
        hardly learns
    R starts equal over j; the inverse temperature of iteration r is 1 + r.
    """
    B, n_in, n_out, _ = votes.shape
    check_shape("activation", activation, "B i", B=B, i=n_in)
    check_shape("beta_v", beta_v, "j", j=n_out)
    check_shape("beta_a", beta_a, "j", j=n_out)
    check_positive(iterations=iterations)
    check_choice("normalise", normalise, ("both", "cost"))
    log_a = activation.clamp_min(torch.finfo(votes.dtype).tiny).log()[:, :, None]
    log_R = votes.new_full((B, n_in, n_out), -math.log(n_out))
    for r in range(iterations):
        log_w = log_R + log_a                                            # R_ij <- R_ij a_i
        w = log_w.softmax(dim=1)                                         # (B, i, j)
        mu = torch.einsum("bij,bijd->bjd", w, votes)                     # M-step, Eq. (2)
        square = (votes - mu[:, None]).square()                          # (B, i, j, d)
        var = torch.einsum("bij,bijd->bjd", w, square) + 1e-8
        log_aj = em_activation(log_w.logsumexp(1), var, beta_v, beta_a, r)
        if r < iterations - 1:
            log_p = -(square / var[:, None] + (2 * math.pi * var).log()[:, None]).sum(-1) / 2
            log_R = em_assignment(log_p, log_aj[:, None], normalise)     # E-step
    return (mu, log_aj.exp(), log_R.exp()) if return_coefficients else (mu, log_aj.exp())


# ---- Losses on class-capsule lengths (B, K) and targets: a scalar, mean over the batch ----------
# A length says whether a class is present, so each class has a loss of its own: long where it is,
# short where it is not, and nothing more once it is long or short enough.

@full_precision
def margin_loss(lengths, target, m_pos=0.9, m_neg=0.1, lam=0.5):
    """Sum_k T_k max(0, m+ - |v_k|)^2 + lam (1 - T_k) max(0, |v_k| - m-)^2.   [Sec. 3.2]

    lengths: (B, K);  target: (B,), class numbers, or (B, K), 1 for each class present -> scalar
    """
    check_shape("lengths", lengths, "B K")
    B, K = lengths.shape
    T = target.to(lengths.dtype)
    if target.dim() == 1:
        check_shape("target", target, "B", B=B)
        T = torch.zeros_like(lengths).scatter(1, target[:, None], 1)
    check_shape("target", T, "B K", B=B, K=K)
    present, absent = (m_pos - lengths).relu().square(), (lengths - m_neg).relu().square()
    return (T * present + lam * (1 - T) * absent).sum(1).mean()


@full_precision
def spread_loss(lengths, target, margin):
    """Sum_{k != t} max(0, margin - (a_t - a_k))^2.   [Table 5, Hinton et al. 2018]

    lengths: (B, K);  target: (B,);  margin: annealed 0.2 -> 0.9 by train.py -> scalar
    """
    check_shape("lengths", lengths, "B K")
    check_shape("target", target, "B", B=lengths.shape[0])
    a_t = lengths.gather(1, target[:, None])                             # (B, 1)
    others = torch.ones_like(lengths).scatter(1, target[:, None], 0)
    return ((margin - (a_t - lengths)).relu().square() * others).sum(1).mean()


# ---- The routed capsule layer of CapNet ----------------------------------------------------------
# Votes are linear in the lower capsule, v_hat_j|i = W_gj u_i, and the P positions of a capsule type
# g share W_gj, as a convolution shares its kernel.  So routing never needs the votes themselves:
# `votes` and the two functions above are the definition, the appendix has the same without them.

def needs_votes():
    """Whether routing must go through explicit votes: while exporting, as a loop over blocks would
    fix the batch; under torch.func, as checkpoint does not work there."""
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)     # torch 2.6
    return exporting() or torch._C._are_functorch_transforms_active()


class RoutedCapsules(nn.Module):
    """Every lower capsule votes for every higher one, routing weighs the votes.   [Sec. 2.1]

    The P capsules of a type share a transform (Fig. 1b); P = 1 gives each capsule its own.
    routing: "dynamic" (softmax over "in" or "out" capsules) or "em";  bias: votes are W u + bias
    b_init: initial logits of dynamic routing, "zero", "random" (drawn once), "learnable"  [Table 5]
        the last two are one number a pair (i, j), for inputs of P = `positions`
    normalise: of EM, as em_routing;  factored: False routes explicit votes, the same and slower
    gain: on the initial scale, 0.3 sqrt(types / in_dim), which makes v a few tenths long at Table
        1's size, neither lost nor saturated by squash (reading 8; the paper says "Gaussian").
        gain=1 suits inputs that are alike at all P positions; where each position has a pose of its
        own their mean is sqrt(P) times shorter: gain=sqrt(P)
    u: (B, types, P, in_dim) -> v (B, out_capsules, out_dim)
    em: u, activation (B, types*P) -> pose (B, out_capsules, out_dim), activation (B, out_capsules)
    """

    def __init__(self, types, in_dim, out_capsules, out_dim, routing="dynamic", iterations=3, *,
                 softmax="in", normalise="both", bias=False, b_init="zero", positions=1,
                 gain=1.0, factored=True):
        super().__init__()
        check_positive(iterations=iterations)
        check_choice("routing", routing, ("dynamic", "em"))
        check_choice("softmax", softmax, ("in", "out"))
        check_choice("normalise", normalise, ("both", "cost"))
        check_choice("b_init", b_init, ("zero", "random", "learnable"))
        if b_init != "zero" and routing == "em":
            raise ValueError(f"b_init={b_init!r}: must be 'zero' with routing='em'")
        self.types, self.in_dim, self.routing = types, in_dim, routing
        self.iterations, self.softmax, self.normalise = iterations, softmax, normalise
        self.factored = factored
        std = 0.3 * gain * math.sqrt(types / in_dim)                     # reading 8
        self.weight = nn.Parameter(torch.randn(types, in_dim, out_capsules, out_dim) * std)
        self.bias = nn.Parameter(torch.zeros(types, out_capsules, out_dim)) if bias else None
        if b_init == "random":
            self.register_buffer("b", torch.randn(types * positions, out_capsules))
        else:
            b = torch.zeros(types * positions, out_capsules)
            self.b = nn.Parameter(b) if b_init == "learnable" else None
        if routing == "em":
            self.beta_v = nn.Parameter(torch.zeros(out_capsules))
            self.beta_a = nn.Parameter(torch.zeros(out_capsules))

    def votes(self, u):
        """v_hat_j|i = w_ij u_i: (B, types, P, in_dim) -> (B, types*P, out_capsules, out_dim)."""
        return torch.einsum("bgpe,gejd->bgpjd", *self.operator(u)).flatten(1, 2)

    def operator(self, u):
        """u and W whose product the votes are: a bias is the weight of a 1."""
        if self.bias is None:
            return u, self.weight
        return F.pad(u, (0, 1), value=1), torch.cat([self.weight, self.bias[:, None]], 1)

    def forward(self, u, activation=None):
        P = u.shape[2] if self.b is None else len(self.b) // self.types
        check_shape("u", u, "B types P in_dim", types=self.types, P=P, in_dim=self.in_dim)
        if self.routing == "dynamic":
            with_votes, without_votes, fewest = dynamic_routing, dynamic_without_votes, 4
            options = {"softmax": self.softmax, "b0": self.b}
        else:
            with_votes, without_votes = em_routing, em_without_votes
            fewest = (self.in_dim + 1) * (self.in_dim + 2) // 6          # a third of its monomials
            options = {"activation": activation, "beta_v": self.beta_v, "beta_a": self.beta_a,
                       "normalise": self.normalise}
        # Below so many positions the votes are faster (measured on a CPU).
        if self.factored and P >= fewest and not needs_votes():
            if torch.compiler.is_compiling():                        # its loops would be unrolled
                without_votes = torch.compiler.disable(without_votes)
            v = without_votes(*self.operator(u), iterations=self.iterations, **options)
        else:
            v = with_votes(self.votes(u), iterations=self.iterations, **options)
        return v if self.routing == "dynamic" else tuple(x.to(u.dtype) for x in v)


# ---- capConv: approximate routing in one pass, by a master and an aide branch --------------------
# Rounds of routing are a search for how much each lower capsule counts.  capConv learns to say it
# at once: two convolutions make candidates v1, v2 of the higher capsules, and two more compute
# from them one coefficient per type and position.

def squash_image(s, types):
    """squash every capsule of an image (B, types*d, H, W)."""
    return squash(s.unflatten(1, (types, -1)), dim=2).flatten(1, 2)


class GroupedConv(nn.Conv2d):
    """nn.Conv2d in which each capsule type has its own kernel, `groups=types`.

    Several types are computed at once, in groups of up to 8 output channels, with weights of 0
    between types: alone, the 1 to 4 channels of a type are less work and still slower on a CPU.
    """

    def forward(self, u):
        out = self.out_channels // self.groups
        n = math.gcd(max(1, 8 // out), self.groups)                      # types at once
        own = torch.eye(n, dtype=torch.bool, device=u.device).view(n, 1, n, 1, 1, 1)
        blocks = self.weight.unflatten(0, (-1, n, out)).unsqueeze(3)     # (., n, out, 1, in, k, k)
        blocks = torch.where(own, blocks, 0.0)                           # (., n, out, n, in, k, k)
        return F.conv2d(u, blocks.flatten(3, 4).flatten(0, 2), self.bias, self.stride,
                        self.padding, self.dilation, self.groups // n)


class ComplementConv(nn.Module):
    """Convolution in which every capsule type sees all types but its own: N-bar_j of Eq. (6).

    weight: (types*out_dim, (types-1)*in_dim, k, k), input channels of the other types in order
    u: (B, types*in_dim, H, W) -> (B, types*out_dim, H', W')
    """

    def __init__(self, in_dim, out_dim, kernel_size, stride, types):
        super().__init__()
        self.types, self.stride, self.padding = types, stride, kernel_size // 2
        self.weight = nn.Conv2d((types - 1) * in_dim, types * out_dim, kernel_size).weight

    def dense(self):
        """The weight as an ordinary (types*out_dim, types*in_dim, k, k), own blocks zero."""
        G = self.types
        blocks = self.weight.unflatten(1, (G - 1, -1)).unflatten(0, (G, -1)).transpose(1, 2)
        blocks = blocks.reshape(G - 1, G, *blocks.shape[2:])             # row by row, six if G = 3
        zero = torch.zeros_like(blocks[:, :1])
        # To  0 a b   go the blocks a to f of G = 3 types.  Read on from row to row that is
        #     c 0 d   0, a b c 0, d e f 0:
        #     e f 0   one zero, then another after every G blocks.
        full = torch.cat([zero[0], torch.cat([blocks, zero], 1).flatten(0, 1)]).unflatten(0, (G, G))
        # (j, i, out, in, k, k) to (j*out, i*in, k, k)
        return full.transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def forward(self, u):
        return F.conv2d(u, self.dense(), stride=self.stride, padding=self.padding)


class CapConv(nn.Module):
    """Approximate routing: s = m1 v1 + m2 v2, BatchNorm, ReLU, squash.   [Eq. (6), Fig. 1c]

    Deviation 2: k2 is not printed.  k2 = k1 + 2 fits the printed seconds of Table 1's (f) and (e);
    the released code has k2 = k1 + 4 (aide_kernel), the own type too, and squash_branches.
    Deviation 6: coefficients have a bias that starts at 1: s = v1 + v2 + a correction.
    Reading 8: BatchNorm's weight starts at 1 / sqrt(out_dim), not at torch's 1.  After ReLU half of
    |s|^2 is left, d / 2 for a weight of 1, so that lengths would start at 0.30 for d = 2 and at
    0.86 for d = 16, where squash is flat; now they start alike, at 0.21 to 0.30.
    v1 = master(u): each type from itself, kernel k1;  v2 = aide(u): each type from all others, k2
    coefficients: what the m's are computed from, one number per type and position [Table 3 (1-4)]
        "own" m1(v1), m2(v2);  "cross" m1(v2), m2(v1);  "both" m1(v1, v2), m2(v1, v2);
        "fixed" m1 = m2 = 1;  None: s = v1
    skip: type I, adds a strided 3x3 convolution of u, in which all types meet, before BatchNorm;
        type II layers instead take `residual`, which the module hands to the last of a chain, also
        before BatchNorm   [Table 3 (5-7)]
    squash_branches: BatchNorm, ReLU, squash in each branch too, as released
    u: (B, types*in_dim, H, W) -> (B, types*out_dim, ceil(H/stride), ceil(W/stride))
    """

    def __init__(self, in_dim, out_dim, kernel_size, stride=1, types=32, coefficients="both",
                 aide_kernel=None, skip=False, squash_branches=False):
        super().__init__()
        aide_kernel = kernel_size + 2 if aide_kernel is None else aide_kernel        # deviation 2
        if kernel_size % 2 == 0 or aide_kernel % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}, aide_kernel={aide_kernel}: must be odd")
        check_choice("coefficients", coefficients, ("both", "own", "cross", "fixed", None))
        if coefficients is not None and types == 1:
            raise ValueError(f"types=1: must be 2 or more with coefficients={coefficients!r} "
                             "(the aide sees the other types)")
        self.types, self.coefficients = types, coefficients
        low, high = types * in_dim, types * out_dim

        def grouped(c_in, c_out, k, stride=1, bias=False):
            return GroupedConv(c_in, c_out, k, stride, k // 2, groups=types, bias=bias)

        self.master = grouped(low, high, kernel_size, stride)
        if coefficients is not None:
            self.aide = ComplementConv(in_dim, out_dim, aide_kernel, stride, types)
        if coefficients in ("both", "own", "cross"):
            both = coefficients == "both"
            scalars = 2 * types if both else types                       # that a branch computes
            self.from_v1 = grouped(high, scalars, 3, bias=True)
            self.from_v2 = grouped(high, scalars, 3, bias=not both)      # both: their sum has one
            for branch in [self.from_v1] if both else [self.from_v1, self.from_v2]:
                nn.init.ones_(branch.bias)                               # deviation 6
        self.skip = nn.Conv2d(low, high, 3, stride, padding=1, bias=False) if skip else None
        self.norm = nn.BatchNorm2d(high)
        self.branch_norms = nn.ModuleList(map(nn.BatchNorm2d, [high] * 2)) \
            if squash_branches and coefficients is not None else None
        for norm in [self.norm, *(self.branch_norms or ())]:
            nn.init.constant_(norm.weight, 1 / math.sqrt(out_dim))       # reading 8

    def end(self, s, norm):
        """BatchNorm, ReLU, squash."""
        return squash_image(F.relu(norm(s)), self.types)

    def branches(self, u):
        """v1, v2 (B, types*d, H', W') and their coefficients m1, m2 (B, types, H', W')."""
        v1, v2 = self.master(u), self.aide(u)
        if self.branch_norms is not None:
            v1, v2 = map(self.end, (v1, v2), self.branch_norms)
        if self.coefficients == "fixed":
            m1 = m2 = torch.ones_like(v1[:, :self.types])
            return v1, v2, m1, m2
        from_v1, from_v2 = self.from_v1(v1), self.from_v2(v2)
        if self.coefficients == "both":                                  # m1, m2 of a type adjoin
            m1, m2 = (from_v1 + from_v2).unflatten(1, (self.types, 2)).unbind(2)
        else:
            m1, m2 = (from_v1, from_v2) if self.coefficients == "own" else (from_v2, from_v1)
        return v1, v2, m1, m2

    def forward(self, u, residual=None):
        if self.coefficients is None:
            s = self.master(u)
        else:
            v1, v2, m1, m2 = self.branches(u)
            v1, v2 = (v.unflatten(1, (self.types, -1)) for v in (v1, v2))     # (B, G, d, H', W')
            s = (m1.unsqueeze(2) * v1 + m2.unsqueeze(2) * v2).flatten(1, 2)   # Eq. (6)
        if self.skip is not None:
            s = s + self.skip(u)
        if residual is not None:
            s = s + residual
        return self.end(s, self.norm)


class CapFC(nn.Module):
    """Class capsules, fully connected within each capsule dimension.   [Sec. 3.1]

    v_jd = squash over d of sum_i W[d, i, j] u_id, no bias.   u: (B, i, d) -> (B, j, d)
    """

    def __init__(self, in_capsules, dim, out_capsules):
        super().__init__()
        weight = torch.randn(dim, in_capsules, out_capsules) / math.sqrt(in_capsules)
        self.weight = nn.Parameter(weight)

    def forward(self, u):
        check_shape("u", u, "B i d", i=self.weight.shape[1], d=self.weight.shape[0])
        return squash(torch.einsum("bid,dij->bjd", u, self.weight))


# ---- Optimal transport between two batches of samples --------------------------------------------
# How far is one cloud of points from another?  Move the mass of the first onto the second along a
# plan P, a unit of mass from x to y at the cost Q_xy, as cheaply as possible: <Q, P>.  With eps
# times the entropy of P as a reward the best plan is exp(-Q/eps) with its rows and columns scaled,
# in turn, until both marginals are right (Sinkhorn).

def unit(z):
    """z / |z| along the last axis; 0 stays 0, with a finite gradient."""
    length = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    return z / torch.where(length > 0, length, 1.0)


@full_precision
def cosine_cost(x, y):
    """1 - cos(x, y), in [0, 2]; a zero vector costs 1 against anything.

    x: (..., n, d);  y: (..., m, d) -> (..., n, m)
    """
    return 1 - unit(x) @ unit(y).mT


@full_precision
def l2_cost(x, y):
    """Euclidean distance, unbounded; value and gradient are 0 where x = y.   [Table 3 (d5)]

    x: (..., n, d);  y: (..., m, d) -> (..., n, m)
    """
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


COSTS = {    # name: what prepares a cloud, the cost between two prepared ones, its upper bound
    "cosine": (unit, lambda x, y: 1 - x @ y.mT, 2.0), "l2": (nn.Identity(), l2_cost, None)}


@full_precision
def ground_costs(x, y, cost, bias_fix):
    """The ground costs of Eq. (11), [Q_xy, Q_xx, Q_yy]; without bias fix of Eq. (8), [Q_xy].

    x: (..., n, d);  y: (..., m, d) -> [(..., n, m), (..., n, n), (..., m, m)]
    """
    prepare, ground, _ = COSTS[cost]
    x, y = prepare(x), prepare(y)
    return [ground(x, y), ground(x, x), ground(y, y)] if bias_fix else [ground(x, y)]


@full_precision
def transport_cost(Q, P):
    """Cost of moving mass along a plan, <Q, P>.   [Eq. (8)]

    Q: (..., n, m) ground cost;  P: (..., n, m) plan, sums to 1 -> (...) in the units of Q
    """
    return (Q * P).sum((-2, -1))


@full_precision
def sinkhorn_plan(Q, eps=0.1, iterations=10, q_max=None, a=None, b=None):
    """Entropic transport plan between two marginals, L Sinkhorn iterations.   [Eqs. (9), (10)]

    Deviation 1: Eq. (9) prints b(l+1) = 1/(K a(l)); a(0) is undefined, so a(l+1) is meant.  Columns
    first, as printed; the released code begins with rows.
    Q: (..., n, m) ground cost;  eps: in the units of Q;  iterations: L
    q_max: a known bound on Q, allows the kernel form where exp(-q_max/eps) is safe; None: log form
    a, b: weights (..., n), (..., m) of the samples, which sum to 1 (POT's names); None: 1/n, 1/m
    -> P (..., n, m): rows sum to a exactly (updated last), columns to b as L grows
    """
    check_positive(float, eps=eps)
    check_positive(iterations=iterations)
    n, m = Q.shape[-2:]
    for name, weights, size in ("a", a, n), ("b", b, m):
        if weights is not None and weights.shape[-1:] != (size,):
            raise ValueError(f"{name} has shape {tuple(weights.shape)}: must be (..., {size})")
    # K >= e^-60 = 9e-27 and the scalings <= 1/K stay normal numbers in float32.
    if q_max is not None and q_max <= 60 * eps and a is None and b is None:
        K = (-Q / eps).exp().reshape(-1, n, m)                           # Gibbs kernel
        a = K.new_ones(K.shape[0], n, 1)                                 # scalings, no weights
        for _ in range(iterations):                                      # Eq. (9)
            b = torch.bmm(a.mT, K).reciprocal()                          # (., 1, m)
            a = torch.bmm(K, b.mT).reciprocal() * (m / n)                # (., n, 1)
        return (a * K * b / m).view(Q.shape)                             # Eq. (10)
    log_a = -math.log(n) if a is None else a.clamp_min(1e-37).log()[..., None]        # 0 -> e^-85
    log_b = -math.log(m) if b is None else b.clamp_min(1e-37).log()[..., None, :]
    log_P = -Q / eps
    for _ in range(iterations):
        log_P = log_P.log_softmax(-2) + log_b
        log_P = log_P.log_softmax(-1) + log_a
    return log_P.exp()


def sinkhorn_cost(Q, eps=0.1, iterations=10, q_max=None, plan_grad=False, **weights):
    """W_Q = <Q, P>, P by Sinkhorn.   [Eq. (8)]

    P is a constant unless plan_grad: slightly better in the paper (Table 3 (d2): 4.58, with the
    gradient 4.77), and it saves the backward pass of L iterations.  At the optimum P is the
    gradient of <Q, P> less eps times the entropy: what is left out vanishes with eps.
    Q: (..., n, m) -> (...)
    """
    constant = Q if plan_grad else Q.detach()
    return transport_cost(Q, sinkhorn_plan(constant, eps, iterations, q_max, **weights))


def debias(xy, xx, yy):
    """2 W(x, y) - W(x, x) - W(y, y).   [Eq. (11)]   POT and geomloss use half of it."""
    return 2 * xy - xx - yy


@full_precision
def sinkhorn_divergence(x, y, eps=0.1, iterations=10, cost="cosine", bias_fix=True,
                        plan_grad=False, a=None, b=None):
    """How far two clouds of samples are from each other.   [Eq. (11)]

    x: (..., n, d);  y: (..., m, d);  cost: "cosine" or "l2"
    eps, iterations, a, b (weights of x, y): as sinkhorn_plan
    bias_fix: False gives W(x, y) of Eq. (8) alone   [Table 3 (d1)]
    plan_grad: differentiate through P too           [Table 3 (d2)]
    -> (...), in the units of the cost
    """
    check_choice("cost", cost, tuple(COSTS))
    W = partial(sinkhorn_cost, eps=eps, iterations=iterations, q_max=COSTS[cost][2],
                plan_grad=plan_grad)
    Q = ground_costs(x, y, cost, bias_fix)
    if x.shape == y.shape and a is None and b is None:              # one batched call for all three
        costs = W(torch.stack(Q))
    else:
        costs = [W(q, a=a, b=b) for q, (a, b) in zip(Q, [(a, b), (a, a), (b, b)], strict=False)]
    return debias(*costs) if bias_fix else costs[0]


@full_precision
def kl_divergence(real, generated):
    """KL(softmax(real) || softmax(generated)), mean over B.   [Table 3 (b)]   (B, F) -> scalar

    Deviation 7: the paper only names it.
    """
    check_shape("generated", generated, "B F", B=real.shape[0], F=real.shape[1])
    return F.kl_div(generated.log_softmax(-1), real.log_softmax(-1), log_target=True,
                    reduction="batchmean")


# ---- Feedback agreement: the higher layer must be able to tell the lower one ---------------------
# A generator makes a lower image of the higher one; an extractor makes short features of the real
# and of the generated images of a batch; their divergence joins the loss.

def gather(x):
    """The samples (B, ...) of all ranks, (ranks*B, ...), differentiable.

    Every rank computes the same divergence of them, so the gradient of a sample summed over ranks
    is its own rank's times their number, which DistributedDataParallel's mean divides out.
    """
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ranks == 1:
        return x
    own = x.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(parts, own)
    parts[dist.get_rank()] = own + ranks * (x - own)
    return torch.cat(parts)


def conv_bn(c_in, c_out, kernel_size=3, stride=1):
    """Convolution and BatchNorm, [2]."""
    return [nn.Conv2d(c_in, c_out, kernel_size, stride, kernel_size // 2, bias=False),
            nn.BatchNorm2d(c_out)]


class FeedbackUnit(nn.Module):
    """Divergence of a lower image from what a generator makes of the higher one.   [App. B]

    low, high: channels;  stride: the step from low to high
    generator: "capsule", transposed 3x3 convolution a type, BatchNorm, ReLU, squash; "vanilla",
        ungrouped, no squash [Table 3 (d4)], also the one for networks without capsules
    extractor: False compares raw pixels (d3);  divergence: "ot", or "kl" (b)
    cost, eps, iterations, bias_fix, plan_grad: as sinkhorn_divergence
    forward(low (B, low, H, W), high (B, high, H', W')) -> scalar
    Deviation 3: the generator is grouped by type, as released; App. B prints "the dimension of
    input capsules", which would mix types here.  The extractor runs once, on real and generated
    samples together, so that both meet the same batch statistics; where it would end in one number,
    which has no gradient under cosine cost, its second stride is 1.
    """

    def __init__(self, low, high, types=32, stride=2, *, generator="capsule", extractor=True,
                 divergence="ot", cost="cosine", eps=0.1, iterations=10, bias_fix=True,
                 plan_grad=False):
        super().__init__()
        check_positive(iterations=iterations)
        check_positive(float, eps=eps)
        check_choice("generator", generator, ("capsule", "vanilla"))
        check_choice("divergence", divergence, ("ot", "kl"))
        check_choice("cost", cost, tuple(COSTS))
        self.types = types if generator == "capsule" else None
        self.kind, self.cost, self.bias_fix = divergence, cost, bias_fix
        self.sinkhorn = {"eps": eps, "iterations": iterations, "plan_grad": plan_grad,
                         "q_max": COSTS[cost][2]}
        self.deconv = nn.ConvTranspose2d(high, low, 3, stride, padding=1, bias=False,
                                         groups=self.types or 1)
        self.norm = nn.BatchNorm2d(low)
        few = max(1, low // 4)
        self.extractor = nn.ModuleList([*conv_bn(low, few, stride=2), *conv_bn(few, 1, stride=2)]
                                       ) if extractor else None

    def generate(self, high, size):
        """g_psi: the lower image (B, low, H, W), of size (H, W), told from the higher one."""
        u = F.relu(self.norm(self.deconv(high, output_size=size)))
        return squash_image(u, self.types) if self.types else u

    def extract(self, image):
        """f_phi: image (B, low, H, W) -> features (B, F).

        The cosine sees directions alone: once all features, real and generated, have the same one
        positive position, divergence and gradient are 0 whatever the images are: the trivial
        minimum, of features that tell no two samples apart.
        """
        if self.extractor is None:
            return image.flatten(1)
        conv1, norm1, conv2, norm2 = self.extractor
        h = F.relu(norm1(conv1(image)))
        stride = 2 if max(h.shape[-2:]) > 2 else 1                       # deviation 3
        return F.relu(norm2(F.conv2d(h, conv2.weight, None, stride, padding=1))).flatten(1)

    def told_apart(self, low):
        """Share of variance between samples in the features of real images.

        Of their directions z, which is all that the cosine cost sees: 1 - |mean z|^2 / mean |z|^2.
        Towards 1: they tell samples apart; 0: all samples look alike, the trivial minimum.
        low: (B, low, H, W), in eval mode, or BatchNorm's averages move -> scalar, in [0, 1)
        """
        z = F.normalize(self.extract(low).float())                       # (B, F)
        square = z.square().sum(1).mean()
        return (1 - z.mean(0).square().sum() / square.clamp_min(1e-12)) * (square > 0)

    def features(self, low, high):
        """Features of the real and of the generated lower image, each (B, F), of all ranks."""
        check_shape("high", high, "B high H W", B=low.shape[0])          # chunk would mix the two
        both = torch.cat([low, self.generate(high, low.shape[-2:])])
        real, generated = self.extract(both).chunk(2)
        return gather(real), gather(generated)

    def costs(self, low, high):
        """Costs of generated x and real y: (3, B, B), xy xx yy; (1, B, B) without bias fix."""
        y, x = self.features(low, high)
        return torch.stack(ground_costs(x, y, self.cost, self.bias_fix))

    def forward(self, low, high):
        return total_feedback([self], [(low, high)])


def total_feedback(units, images):
    """Sum of the divergences of units of one kind over their images [(low, high), ...] -> scalar.

    All optimal transport problems of a step are solved in one batched call.
    """
    first = units[0]
    if first.kind == "kl":
        return sum(kl_divergence(*unit.features(*pair))
                   for unit, pair in zip(units, images, strict=True))
    costs = [unit.costs(*pair) for unit, pair in zip(units, images, strict=True)]
    W = sinkhorn_cost(torch.stack(costs), **first.sinkhorn).unbind(-1)   # xy, xx, yy: (units,) each
    return (debias(*W) if first.bias_fix else W[0]).sum()


# ---- The networks.  model(x) -> (scores (B, K), feedback scalar, 0 in eval and without a unit) ---
# Each is a stem, modules if it has any, and scores.  EncapNet is convolution, four modules of
# capConv, capFC; the six-layer networks of Table 1 share their first four convolutions; CNN and
# ResNet are what they are compared with.

def conv_bn_relu(c_in, c_out, stride=1):
    return nn.Sequential(*conv_bn(c_in, c_out, 3, stride), nn.ReLU())


def capsules(image, types):
    """(B, G*d, H, W) -> (B, G, P, d), P = H*W."""
    return image.unflatten(1, (types, -1)).flatten(3).transpose(2, 3)


class Network(nn.Module):
    """What all networks share; each adds its stem, image -> image, and scores, image -> (B, K).

    sizes: further integers that must be positive;  logits: whether scores are logits or lengths
    """

    logits = False

    def __init__(self, num_classes, in_channels, image_size, **sizes):
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels, image_size=image_size,
                       **sizes)
        self.image = {"C": in_channels, "H": image_size, "W": image_size}
        self.blocks, self.units, self.feedback = (), (), 0

    def add_units(self, feedback, channels, strides, **unit):
        """One unit a module, output -> input, or two, also output -> type II input."""
        check_choice("feedback", feedback, (0, 1, 2))
        self.units, self.feedback = nn.ModuleList(), feedback
        for low, high, stride in zip(channels[:-1], channels[1:], strides, strict=True):
            if feedback:
                self.units.append(FeedbackUnit(low, high, stride=stride, **unit))
            if feedback == 2:
                self.units.append(FeedbackUnit(high, high, stride=1, **unit))

    def walk(self, u):
        """Image u through all modules -> last image, the images (low, high) of every unit."""
        images = []
        for module in self.blocks:
            first, v = module(u)
            if self.feedback:
                images.append((u, v))
            if self.feedback == 2:
                images.append((first, v))
            u = v
        return u, images

    def forward(self, x):
        check_shape("x", x, "B C H W", **self.image)
        u, images = self.walk(self.stem(x))
        feedback = u.new_zeros(())
        if self.training and self.feedback:
            feedback = total_feedback(self.units, images)
        return self.scores(u), feedback


class EncapModule(nn.Module):
    """Type I capConv, which raises the dimension, then a chain of N of type II.  [Fig. 3a, Table 2]

    u -> the images after type I and after the chain
    """

    def __init__(self, in_dim, out_dim, depth, stride, skip, **options):
        super().__init__()
        self.skip = skip in ("both", "II")
        self.reduce = CapConv(in_dim, out_dim, 3, stride, skip=skip in ("both", "I"), **options)
        self.chain = nn.ModuleList(CapConv(out_dim, out_dim, 1, **options) for _ in range(depth))

    def forward(self, u):
        first = v = self.reduce(u)
        for layer in self.chain[:-1]:
            v = layer(v)
        return first, self.chain[-1](v, residual=first if self.skip else None)


class EncapNet(Network):
    """Convolution, capConv modules, capFC.   [Table 2]

    depths: N of each module;  dims: capsule dimension before and after each;  types: capsule types
    coefficients, aide_kernel, squash_branches: as CapConv; coefficients also a tuple, one a module
    skip: "both", "I", "II" or None [Table 3 (5-7)];  stem_stride: 4 for images of 128 and more
    feedback: units a module, 0, 1, 2;  further keywords go to FeedbackUnit
    Deviation 9: the stem M0 is convolution, BatchNorm, ReLU, not squashed; the vanilla generator of
    Table 3 (d4) keeps BatchNorm and ReLU and drops grouping and squash.
    """

    def __init__(self, num_classes=10, in_channels=3, image_size=32, *, depths=(3, 3, 3, 3),
                 dims=(1, 2, 4, 8, 16), types=32, coefficients="both", aide_kernel=None,
                 skip="both", squash_branches=False, stem_stride=1, feedback=0, **unit):
        super().__init__(num_classes, in_channels, image_size, types=types, depths=depths,
                         dims=dims, stem_stride=stem_stride, aide_kernel=aide_kernel or 1)
        check_choice("skip", skip, ("both", "I", "II", None))
        if len(dims) != len(depths) + 1:
            raise ValueError(f"dims={dims!r}: must be one number more than depths={depths!r}")
        if not isinstance(coefficients, (tuple, list)):
            coefficients = (coefficients,) * len(depths)
        if len(coefficients) != len(depths):
            raise ValueError(f"coefficients={coefficients!r}: must be one or {len(depths)}")
        strides = (1,) + (2,) * (len(depths) - 1)
        self.types = types
        self.stem = conv_bn_relu(in_channels, types * dims[0], stem_stride)
        self.blocks = nn.ModuleList(
            EncapModule(*dims[m:m + 2], depths[m], strides[m], skip, types=types,
                        coefficients=coefficients[m], aide_kernel=aide_kernel,
                        squash_branches=squash_branches) for m in range(len(depths)))
        self.add_units(feedback, [types * d for d in dims], strides, types=types, **unit)
        side = math.ceil(image_size / (stem_stride * math.prod(strides)))
        self.classes = CapFC(types * side ** 2, dims[-1], num_classes)

    def scores(self, u):
        return self.classes(capsules(u, self.types).flatten(1, 2)).norm(dim=-1)


def six_layer_stem(in_channels, types):
    """The four convolutions that the networks of Table 1 share: (B, 8*types, H/4, W/4).

    App. A prints "stride and padding is 3 and 1", which means kernel 3, padding 1.
    """
    channels = (in_channels, types, 2 * types, 4 * types, 8 * types)
    return nn.Sequential(*map(conv_bn_relu, channels[:-1], channels[1:], (1, 1, 2, 2)))


class EncapNet6(Network):
    """Table 1 (e), (f): four convolutions, a capConv 8 -> 16 from 8x8 to 4x4, capFC.   [App. A.i]

    Stride 2 and the skip are those of the authors' logs, not of the print: with them (e) has the
    1.69 million weights of Table 1 (25.8 Mb, 16 bits each).
    """

    def __init__(self, num_classes=10, in_channels=3, image_size=32, *, types=32,
                 coefficients="both", aide_kernel=None, skip=True):
        super().__init__(num_classes, in_channels, image_size, types=types,
                         aide_kernel=aide_kernel or 1)
        self.types = types
        self.stem = six_layer_stem(in_channels, types)
        self.capconv = CapConv(8, 16, 3, stride=2, types=types, coefficients=coefficients,
                               aide_kernel=aide_kernel, skip=skip)
        self.classes = CapFC(types * math.ceil(image_size / 8) ** 2, 16, num_classes)

    def scores(self, u):
        return self.classes(capsules(self.capconv(u), self.types).flatten(1, 2)).norm(dim=-1)


class CapNet(Network):
    """Table 1 (a), (b): four convolutions, 2,048 capsules of 8 -> as many of 16 -> K of 16.

    routing, iterations, softmax, normalise, b_init, factored: as RoutedCapsules
    fifth_conv: one more 3x3 convolution before the capsules, as deep as the other rows of Table 1
    Deviation 10: the activation of a lower capsule of EM is the sigmoid, not the released ReLU, of
    BatchNorm of a convolution; a class score is |squash(mu)|, not the activation.
    """

    def __init__(self, num_classes=10, in_channels=3, image_size=32, *, types=32, routing="dynamic",
                 iterations=3, softmax="in", normalise="both", b_init="zero", factored=True,
                 fifth_conv=False):
        super().__init__(num_classes, in_channels, image_size, types=types)
        self.types, self.routing = types, routing
        self.stem, side = six_layer_stem(in_channels, types), math.ceil(image_size / 4)
        if fifth_conv:
            self.stem.append(conv_bn_relu(8 * types, 8 * types))
        options = dict(routing=routing, iterations=iterations, softmax=softmax, b_init=b_init,
                       normalise=normalise, factored=factored, positions=side ** 2, bias=True)
        self.routed = nn.ModuleList([
            RoutedCapsules(types, 8, types * side ** 2, 16, **options),
            RoutedCapsules(types, 16, num_classes, 16, gain=side, **options)])  # reading 8
        if routing == "em":
            self.activation = nn.Sequential(*conv_bn(8 * types, types), nn.Sigmoid())

    def scores(self, image):
        first, last = self.routed
        u = capsules(image, self.types)                                  # (B, G, P, 8)
        if self.routing == "em":
            pose, a = first(u, self.activation(image).flatten(1))        # (B, G*P, 16), (B, G*P)
            v = squash(last(pose.unflatten(1, u.shape[1:3]), a)[0])      # classes compete by length
        else:
            v = last(first(u).unflatten(1, u.shape[1:3]))
        return v.norm(dim=-1)


class CNN(Network):
    """Table 1 (c), (d): five convolutions, average pooling, a linear layer.   [App. A.i]

    channels: of the five convolutions;  width: factor on them
    """

    logits = True

    def __init__(self, num_classes=10, in_channels=3, image_size=32, *,
                 channels=(32, 64, 128, 256, 512), width=1.0):
        super().__init__(num_classes, in_channels, image_size, channels=channels)
        check_positive(float, width=width)
        channels = [in_channels, *(max(1, round(width * c)) for c in channels)]
        self.stem = nn.Sequential(*map(conv_bn_relu, channels[:-1], channels[1:], (1, 1, 2, 2, 1)))
        self.classes = nn.Linear(channels[-1], num_classes)

    def scores(self, u):
        return self.classes(u.mean((2, 3)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, res() of Table 2."""

    def __init__(self, c_in, c_out, stride=1):
        super().__init__()
        self.body = nn.Sequential(conv_bn_relu(c_in, c_out, stride), *conv_bn(c_out, c_out))
        same = (c_in, stride) == (c_out, 1)
        self.shortcut = nn.Sequential(*([] if same else conv_bn(c_in, c_out, 1, stride)))

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


class ResidualModule(nn.Module):
    """n residual blocks;  u -> the images after the first and after the last."""

    def __init__(self, c_in, c_out, n, stride):
        super().__init__()
        self.first = ResidualBlock(c_in, c_out, stride)
        self.rest = nn.Sequential(*(ResidualBlock(c_out, c_out) for _ in range(n - 1)))

    def forward(self, u):
        first = self.first(u)
        return first, self.rest(first)


class ResNet(Network):
    """The residual network with EncapNet's input and output shapes.   [Table 2]

    blocks: n of each module, 2 + 2 sum(n) layers;  width: factor on 32, 64, 128, 256, 512 channels
    feedback: units a module, 0, 1, 2, generator vanilla;  further keywords go to FeedbackUnit
    """

    logits = True

    def __init__(self, num_classes=10, in_channels=3, image_size=32, *, blocks=(2, 2, 2, 2),
                 width=1.0, feedback=0, generator="vanilla", **unit):
        super().__init__(num_classes, in_channels, image_size, blocks=blocks)
        check_positive(float, width=width)
        channels = [max(1, round(width * 32)) * 2 ** k for k in range(len(blocks) + 1)]
        strides = (1,) + (2,) * (len(blocks) - 1)
        self.stem = conv_bn_relu(in_channels, channels[0])
        self.blocks = nn.ModuleList(
            map(ResidualModule, channels[:-1], channels[1:], blocks, strides))
        self.add_units(feedback, channels, strides, generator=generator, **unit)
        self.classes = nn.Linear(channels[-1], num_classes)

    def scores(self, u):
        return self.classes(u.mean((2, 3)))


# ---- Registry: a model is a class and the keywords that make it ----------------------------------

class Model(NamedTuple):
    """network: its class;  keywords: of it;  parameters: of ten classes and colour images of this
    image_size, the units' among them"""

    network: type
    keywords: dict
    parameters: int
    image_size: int = 32


V2 = dict(depths=(23, 24, 24, 24), coefficients=(None, None, "both", "both"), stem_stride=4,
          feedback=2)
SMALL = dict(depths=(1, 1, 1), dims=(2, 4, 8, 16), types=8, stem_stride=2, feedback=1,
             aide_kernel=3)                                 # 3x3, so that a CPU has it sooner

MODELS = {
    "encapnet": Model(EncapNet, dict(feedback=2), 16_333_608),               # v1, 18 layers
    "encapnet-v2": Model(EncapNet, V2, 76_369_768, image_size=128),          # 101 layers
    "encapnet-v3": Model(EncapNet, V2, 76_538_728, image_size=224),          # v2 on larger images
    "encapnet-small": Model(EncapNet, SMALL, 428_362),                       # the default on digits
    "encapnet6": Model(EncapNet6, dict(coefficients="both"), 4_881_248),     # Table 1 (f)
    "encapnet6-master": Model(EncapNet6, dict(coefficients=None), 1_688_352),            # (e)
    "capnet-dynamic": Model(CapNet, dict(routing="dynamic"), 9_913_120),                 # (a)
    "capnet-em": Model(CapNet, dict(routing="em"), 9_991_028),                           # (b)
    "cnn-same": Model(CNN, {}, 1_574_698),                                               # (c)
    "cnn-similar": Model(CNN, dict(channels=(32, 256, 512, 512, 1300)), 9_622_170),      # (d)
    "resnet18": Model(ResNet, dict(blocks=(2, 2, 2, 2)), 11_156_778),        # Tables 2, 3
}


def keywords(cls):
    """Names of the keywords that a class takes, and of FeedbackUnit's where it takes `unit`."""
    parameters = inspect.signature(cls).parameters
    names = {name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    return names | keywords(FeedbackUnit) if "unit" in parameters else names


def build(name, num_classes=10, in_channels=3, image_size=None, **overrides):
    """A network of the paper by name, any keyword of its class overridden.   [Tables 1, 2, 3, 5]

    image_size: None is the registry's
    -> model;  model(x (B, in_channels, image_size, image_size)) -> scores (B, K), feedback ()
    """
    check_choice("name", name, tuple(MODELS))
    cls, defaults, _, usual_size = MODELS[name]
    unknown = set(overrides) - keywords(cls)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: must be one of "
                         f"{', '.join(sorted(keywords(cls)))} for {name}")
    return cls(num_classes, in_channels, image_size or usual_size, **{**defaults, **overrides})


# ---- Appendix: routing without votes -------------------------------------------------------------
# The P capsules of type g share W_gj, so v_hat_ij = W_gj u_i is an operator, not a tensor: the
# 2,048 x 2,048 votes of 16 numbers in Table 1's layer would take 268 MB for every sample.
#
# Dynamic.  A vote meets the rest twice.  After r rounds
#     b_ij = v_hat_ij . (v_1 + .. + v_r) = u_i . query_gj,   query_gj = W_gj^T (v_1 + .. + v_r)
#     s_j  = sum_i c_ij W_gj u_i         = sum_g W_gj (sum_p c_ij u_i)
# so agreement is an inner product of 8 numbers, and inputs are pooled before they are mapped.
#
# EM.  The votes enter through their weighted sum, their weighted squares and their distance from
# the mean.  With u_i = centre_g + x_i, a vote is W_gj centre_g + W_gj x_i, so each of the three is
# a polynomial of degree two in x_i: sums over positions of R x x^T, R x and R are all it takes.
#
# Both go through in blocks of about BLOCK numbers that backward computes again, so that neither the
# votes nor, in Table 1's layer, the n_in x n_out coefficients ever live at once.

BLOCK = 2 ** 20                                                          # numbers an array may hold
checkpoint = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False,
                     preserve_rng_state=False)


def pool(u, query, b0, softmax):
    """sum_p c_ij u_i:  u (B, G, P, e), query (B, G, e, j) -> (B, G, e, j)"""
    b = u @ query + b0                                                   # (B, G, P, j)
    if softmax == "out":
        return u.mT @ b.softmax(-1)
    c = (b - b.detach().amax((1, 2), keepdim=True)).exp()                # not yet normalised
    return u.mT @ c / c.sum((1, 2), keepdim=True)                        # here (e, j), not (P, j)


def dynamic_rounds(u, W, b0, iterations, softmax):
    """dynamic_routing of a block of samples and higher capsules.

    u: (B, G, P, e);  W: (G, e, j, d);  b0: (G, P, j) -> v (B, j, d)
    """
    B, G, P, e = u.shape
    W = W.permute(2, 0, 1, 3).flatten(1, 2)                              # (j, G*e, d)
    query, V = u.new_zeros(B, G, e, W.shape[0]), 0
    for r in range(iterations):
        v = squash(pool(u, query, b0, softmax).flatten(1, 2).permute(2, 0, 1) @ W)  # (j, B, d)
        if r < iterations - 1:
            V = V + v
            query = (V @ W.mT).permute(1, 2, 0).unflatten(1, (G, e)).contiguous()
    return v.transpose(0, 1)


def dynamic_without_votes(u, W, iterations=3, softmax="in", b0=None):
    """dynamic_routing of the votes W u.   u: (B, G, P, e);  W: (G, e, j, d) -> v (B, j, d)

    With the softmax over i this is iterated attention: queries v_j, keys and values u_i.  Higher
    capsules never interact then, and go in blocks, as samples do: 64 and more of them fit a block.
    Over j they compete and stay together.
    """
    B, G, P, _ = u.shape
    n_out = W.shape[2]
    b0 = u.new_zeros(G, P, 1).expand(G, P, n_out) if b0 is None else b0.unflatten(0, (G, P))
    together = 64 if softmax == "in" else n_out
    samples = max(1, BLOCK // (together * G * P))                        # at once
    size = max(1, BLOCK // (min(samples, B) * G * P)) if softmax == "in" else n_out
    blocks = list(zip(W.split(size, 2), b0.split(size, 2), strict=True))
    return torch.cat([
        torch.cat([checkpoint(dynamic_rounds, part, *block, iterations, softmax)
                   for block in blocks], 1) for part in u.split(samples)])


def pairs(x, dim, double):
    """Products x_a x_b, a <= b, along an axis dim < 0, those with a < b times `double`."""
    n = x.shape[dim]
    a, b = torch.triu_indices(n, n, device=x.device)
    scale = torch.where(a < b, double, 1).to(x).view(-1, *[1] * (-1 - dim))
    return x.index_select(dim, a) * x.index_select(dim, b) * scale


def em_moments(phi, log_a, centre, W, mu=None, var=None, log_aj=None, normalise="both"):
    """E-step, then the moments of the new assignment, over the votes of some types.

    With u = centre + x, a vote is mu + delta + W x, delta = W centre - mu; phi are the monomials
    of x up to degree 2.  Around the centre of each type and sample float32 loses little.
    phi: (B, g, f, P), the monomials x_a x_b, x_a, 1;  log_a: (B, g, P, 1);  centre: (B, g, e)
    W: (j, e, g, d);  mu, var (B, j, d), log_aj (B, j) of the last M-step, or None: R is uniform
    -> over these types log sum R a (B, j), mean (B, j, d), variance (B, j, d)
    """
    n_out, e = W.shape[:2]
    W2 = pairs(W, -3, 2)                                                 # (j, e(e+1)/2, g, d)
    vote = torch.einsum("jegd,bge->bgjd", W, centre)                     # votes of the centres
    if mu is None:
        log_w = log_a - math.log(n_out)                                      # (B, g, P, 1)
    else:
        delta, precision = vote - mu[:, None], 1 / (2 * var)         # half of it
        distance = phi.mT @ torch.cat([                                  # (B, g, P, j)
            torch.einsum("jqgd,bjd->bgqj", W2, precision),
            torch.einsum("jegd,bgjd->bgej", W, 2 * delta * precision[:, None]),
            (delta.square() * precision[:, None]).sum(-1)[:, :, None]], 2)
        log_p = -(2 * math.pi * var).log().sum(-1)[:, None, None] / 2 - distance
        log_w = em_assignment(log_p, log_aj[:, None, None], normalise) + log_a
    top = log_w.detach().amax((1, 2), keepdim=True)
    w = (log_w - top).exp()
    T = (phi @ w).expand(-1, -1, -1, n_out)                                  # (B, g, f, j), of x
    T2, T1, T0 = T.split((T.shape[2] - e - 1, e, 1), 2)
    mass = T0.sum(1)[:, 0, :, None]                                      # (B, j, 1), 1 or more
    T0 = T0.movedim(2, 3)                                                # (B, g, j, 1)
    Wx = torch.einsum("jegd,bgej->bgjd", W, T1)
    mean = (T0 * vote + Wx).sum(1) / mass
    delta = vote - mean[:, None]
    square = torch.einsum("jqgd,bgqj->bjd", W2, T2) + (delta * (2 * Wx + T0 * delta)).sum(1)
    return mass[..., 0].log() + top[:, 0, 0], mean, square / mass


def em_merge(parts):
    """Moments over all types, of those over some: log mass (B, j), mean and variance (B, j, d)."""
    log_mass, mean, square = map(torch.stack, zip(*parts, strict=True))
    share = log_mass.softmax(0)[..., None]                               # (parts, B, j, 1)
    mu = (share * mean).sum(0)
    var = (share * (square + (mean - mu).square())).sum(0)               # law of total variance
    return log_mass.logsumexp(0), mu, var.clamp_min(0) + 1e-8


@full_precision
def em_without_votes(u, W, activation, beta_v, beta_a, iterations=3, normalise="both"):
    """em_routing of the votes W u.   u: (B, G, P, e);  W: (G, e, j, d);  activation: (B, G*P)

    -> pose (B, j, d), activation (B, j);  samples and types go in blocks, backward recomputes each
    """
    B, G, P, e = u.shape
    n_out, d = W.shape[2:]
    monomials = (e + 1) * (e + 2) // 2
    size = min(G, max(1, 4 * BLOCK // (n_out * d * monomials)))          # types at once
    samples = max(1, 2 * BLOCK // (n_out * P * size))                    # at once
    if B > samples:
        parts = [checkpoint(em_without_votes, x, W, a, beta_v, beta_a, iterations, normalise)
                 for x, a in zip(u.split(samples), activation.split(samples), strict=True)]
        return tuple(map(torch.cat, zip(*parts, strict=True)))
    centre = u.mean(2)
    x = (u - centre[:, :, None]).mT                                      # (B, G, e, P)
    phi = torch.cat([pairs(x, -2, 1), x, torch.ones_like(x[:, :, :1])], 2)   # (B, G, f, P)
    log_a = activation.clamp_min(torch.finfo(u.dtype).tiny).log().view(B, G, P, 1)
    inputs = (t.split(size, 1) for t in (phi, log_a, centre))
    blocks = list(zip(*inputs, W.permute(2, 1, 0, 3).split(size, 2), strict=True))
    state = ()
    for r in range(iterations):
        parts = [checkpoint(em_moments, *block, *state, normalise=normalise) for block in blocks]
        log_mass, mu, var = checkpoint(em_merge, parts)
        log_aj = em_activation(log_mass, var, beta_v, beta_a, r)
        state = mu, var, log_aj
    return mu, log_aj.exp()
