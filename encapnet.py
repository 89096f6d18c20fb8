"""Neural Network Encapsulation (Li, Guo, Dai, Ouyang, Wang; ECCV 2018, arXiv:1808.03749).

A neuron uses a single number to say that something is there.  A *capsule* is a small vector: its
length says whether the thing is there, its direction describes what it is like.  Capsules lie on a
grid as the neurons of a convolutional layer do: where a feature map has channels, a *capsule image*
has *types*, with one capsule of each type at every position.

Every lower capsule u_i predicts every higher capsule j: a matrix maps u_i to its *vote* v_hat_j|i.
Where many votes for j agree, the parts that cast them fit into a whole.  So a vote that agrees with
the others gains weight, j is computed again from the weighted votes, and so on for a few
iterations.  That is *routing by agreement* (dynamic_routing); *EM routing* (em_routing) fits a
Gaussian to the votes where dynamic routing takes their mean.  The cost is quadratic: n lower and n
higher capsules exchange n^2 votes, 268 MB per image for the 2,048 capsules of Table 1.

The paper replaces the iterations by one pass, *capConv*: a higher capsule receives the lower
capsules of its own type through a master branch and those of all other types through an aide
branch, and two small convolutions compute how much each branch counts.  In training the paper also
requires that a layer can be reconstructed from the one above: a *feedback unit* generates the lower
capsule image from the higher one, and an optimal transport divergence compares what it generates
for a batch with the batch's real lower images.

Axes    B batch · i / j lower / higher capsules, n_in / n_out their numbers · d numbers per capsule,
        e per lower capsule where both occur · G capsule types, g one of them · P positions, p one
        of them · H, W height and width · K classes · n, m samples of two clouds · t iteration.  In
        optimal transport P is the plan
Layout  a capsule image is (B, G*d, H, W): the d channels of type 1, then those of type 2, and so
        on, so that a convolution with groups=G treats each type on its own

Where each equation lives
    Sec. 2.1    squash ............... squash            Eq. (8)   <Q, P> .. sinkhorn_divergence
    Eq. (1)     dynamic routing ...... dynamic_routing   Eq. (9)   scalings ..... sinkhorn_plan
    Eqs. (2,3)  EM routing ........... em_routing        Eq. (10)  plan ......... sinkhorn_plan
    Eq. (4)     sum_i c_ij w_ij u_i .. RoutedCapsules    Eq. (11)  2W-W-W . sinkhorn_divergence
    Eqs. (5,6)  m1 v1 + m2 v2 ........ CapConv           App. B    g, f ......... FeedbackUnit
    Sec. 3.1    capFC ................ CapFC             Table 2   networks ..... EncapNet, ResNet

Where the paper is ambiguous, or we differ from it or from the authors' released code, the code says
"Deviation" with the number in this list
    1  order of Sinkhorn's updates .. sinkhorn_plan     7  softmax before KL ..... kl_divergence
    2  kernels, skip ................ CapConv           8  scales . RoutedCapsules, CapConv, CapNet
    3  generator, extractor ......... FeedbackUnit      9  stem, vanilla generator ....... EncapNet
    4  softmax over i ............... dynamic_routing  10  EM's activations and scores ..... CapNet
    5  EM is standardised over j .... standardise      11  Table 1 by logs . CNN, CapNet, EncapNet6
    6  coefficients start at 1 ...... CapConv
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

# ---- Small tools: checks of arguments, float32 inside half precision -----------------------------

def check_choice(allowed, **arguments):
    for name, value in arguments.items():
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}")


def check_positive(kind=int, **arguments):
    """Each argument, a number or a tuple of numbers, is positive."""
    for name, value in arguments.items():
        for x in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(x, bool) or not isinstance(x, (int, kind)) or not 0 < x < math.inf:
                raise ValueError(f"{name}={value!r}: must be a positive {kind.__name__}")


def check_tuple(**arguments):
    for name, value in arguments.items():
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"{name}={value!r}: must be a tuple")


def check_shape(name, x, axes, **sizes):
    """x has the axes named, as in "B K", some of them of given sizes."""
    axes = axes.split()
    if len(axes) != x.dim() or any(sizes.get(axis, size) != size
                                   for axis, size in zip(axes, x.shape, strict=True)):
        raise ValueError(f"{name} has shape {tuple(x.shape)}: must be ({', '.join(axes)}) "
                         + ", ".join(f"{axis}={size}" for axis, size in sizes.items()))


def full_precision(function):
    """Decorator: half-precision tensors arrive as float32, and autocast is off inside."""
    def upcast(x):
        half = isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16)
        return x.float() if half else x

    @wraps(function)
    def wrapped(*args, **kwargs):
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        with torch.autocast(tensors[0].device.type if tensors else "cpu", enabled=False):
            return function(*map(upcast, args),
                            **{name: upcast(value) for name, value in kwargs.items()})
    return wrapped


# ---- squash, and the two classic routings on explicit votes: the readable definition -------------
# Dynamic routing takes a weighted mean of the votes and measures agreement by the inner product; EM
# routing fits a Gaussian and measures agreement by its log density.  A capsule of EM is a *pose*,
# the vector, and an *activation*, a number in [0, 1] that takes the place of the vector's length.

def squash(s, dim=-1):
    """Shrink a vector to a length below 1 and keep its direction.   [Sec. 2.1]

    v = |s|^2 / (1 + |s|^2) * s / |s| = s |s| / (1 + |s|^2);  finite value and gradient at s = 0.
    s: any shape, the numbers of a capsule along `dim` -> the same shape and dtype
    """
    wide = s.float() if s.dtype in (torch.float16, torch.bfloat16) else s  # |s|^2 overflows in half
    square = wide.square().sum(dim, keepdim=True)                        # |s|^2
    length = square.clamp_min(torch.finfo(wide.dtype).tiny).sqrt()       # gradient 0 at s = 0
    return (wide * (length / (1 + square))).to(s.dtype)


def dynamic_routing(votes, iterations=3, softmax="in", b0=None, return_coefficients=False):
    """Routing by agreement: votes that agree with the mean vote gain weight.   [Eqs. (1), (4)]

    votes: (B, i, j, d), v_hat_j|i;  b0: initial logits, broadcast to (B, i, j), or None
    softmax: the axis over which the coefficients c sum to 1
        "in", over i, as in the paper: the votes for j compete, and s_j is their weighted mean
        "out", over j, as in Sabour et al.: the higher capsules compete for each lower one
        Deviation 4: the authors' loss did not converge with "out" (App. A.i).  Ours does, so we
        offer both.
    -> v (B, j, d), lengths in [0, 1);  with return_coefficients also c (B, i, j), last iteration
    """
    check_positive(iterations=iterations)
    check_choice(("in", "out"), softmax=softmax)
    b = votes.new_zeros(()) if b0 is None else b0
    b = b.expand(votes.shape[:3])                                        # logits (B, i, j)
    for t in range(iterations):
        c = b.softmax(dim=1 if softmax == "in" else 2)                   # (B, i, j)
        s = torch.einsum("Bij,Bijd->Bjd", c, votes)                      # Eq. (4)
        v = squash(s)                                                    # (B, j, d)
        if t < iterations - 1:
            b = b + torch.einsum("Bijd,Bjd->Bij", votes, v)              # Eq. (1)
    return (v, c) if return_coefficients else v


def standardise(x):
    """Zero mean and unit variance over the last axis; 0 where all are equal.   [App. A.i]

    Deviation 5: App. A.i calls a normalisation before the sigmoid crucial and gives no formula.  We
    standardise over j, in em_routing below, both the cost and the log densities.  Each is a sum
    over the d numbers of a pose, so differences between capsules j add up until the softmax gives
    each vote to a single j.  A capsule left with one or two votes has almost no variance, which
    makes its next log densities more extreme still: trained so, a small network ends at 57 %
    error on MNIST, standardised at 7 % (`python -m lab.why em`).
    """
    # layer_norm computes x / std - mean / std, which is inexact where |mean| >> std: shift first.
    x = x - x.detach().amax(-1, keepdim=True)
    return F.layer_norm(x, x.shape[-1:], eps=1e-10)                      # eps: on the variance


def em_activation(log_mass, var, beta_v, beta_a, t):
    """Log activation of each higher capsule: high if its votes lie close together.   [Eq. (2)]

    log_mass: (B, j), log sum_i R_ij a_i;  var: (B, j, d);  beta_v, beta_a: (j,);  t: iteration
    -> (B, j)
    """
    # A common factor of the masses cancels in standardise; this one keeps its eps negligible.
    mass = (log_mass - log_mass.amax(-1, keepdim=True)).exp()
    cost = mass * (beta_v[:, None] + var.log() / 2).sum(-1)              # sum over d
    return F.logsigmoid((1 + t) * (beta_a - standardise(cost)))


@full_precision
def em_routing(votes, activation, beta_v, beta_a, iterations=3, return_coefficients=False):
    """Fit one Gaussian per higher capsule to the votes by expectation maximisation. [Eqs. (2), (3)]

    R_ij = 1 / n_out at first.  Iteration t, with cost and log N standardised over j (deviation 5):
        M-step  mean_j, var_j of the votes v_hat_j|i, weighted by r_ij = R_ij a_i
                cost_j = sum_i r_ij sum_d (beta_v + log std_j)
                a_j = sigmoid((1 + t) (beta_a - cost_j))
        E-step  R_ij = softmax over j of log a_j + log N(v_hat_j|i; mean_j, var_j)
    votes: (B, i, j, d);  activation: (B, i), in [0, 1];  beta_v, beta_a: (j,)
    -> pose (B, j, d), the means;  activation (B, j), in [0, 1]
       with return_coefficients also R (B, i, j), the assignment used by the last M-step
    """
    B, n_in, n_out, _ = votes.shape
    check_shape("activation", activation, "B i", B=B, i=n_in)
    check_shape("beta_v", beta_v, "j", j=n_out)
    check_shape("beta_a", beta_a, "j", j=n_out)
    check_positive(iterations=iterations)
    log_a = activation.clamp_min(torch.finfo(votes.dtype).tiny).log()[:, :, None]     # (B, i, 1)
    log_R = votes.new_full((B, n_in, n_out), -math.log(n_out))
    for t in range(iterations):
        log_r = log_R + log_a                                            # r_ij = R_ij a_i
        share = log_r.softmax(dim=1)                                     # r_ij / sum_i r_ij
        mean = torch.einsum("Bij,Bijd->Bjd", share, votes)               # M-step, Eq. (2)
        square = (votes - mean[:, None]).square()                        # (B, i, j, d)
        var = torch.einsum("Bij,Bijd->Bjd", share, square) + 1e-8
        log_aj = em_activation(log_r.logsumexp(1), var, beta_v, beta_a, t)
        if t < iterations - 1:
            log_p = -(square / var[:, None] + (2 * math.pi * var).log()[:, None]).sum(-1) / 2
            log_R = (log_aj[:, None] + standardise(log_p)).log_softmax(-1)       # E-step, Eq. (3)
    return (mean, log_aj.exp(), log_R.exp()) if return_coefficients else (mean, log_aj.exp())


# ---- Losses on class-capsule lengths (B, K) and targets: a scalar, mean over the batch ----------

@full_precision
def margin_loss(lengths, target, m_pos=0.9, m_neg=0.1, lam=0.5):
    """Sum_k T_k max(0, m+ - |v_k|)^2 + lam (1 - T_k) max(0, |v_k| - m-)^2.   [Sec. 3.2]

    lengths: (B, K);  target: (B,), class indices, or (B, K), 1 for each class present -> scalar
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

    lengths: (B, K);  target: (B,);  margin: raised from 0.2 to 0.9 during training -> scalar
    """
    check_shape("target", target, "B", B=lengths.shape[0])
    a_t = lengths.gather(1, target[:, None])                             # (B, 1)
    others = torch.ones_like(lengths).scatter(1, target[:, None], 0)
    return (others * (margin - (a_t - lengths)).relu().square()).sum(1).mean()


# ---- The routed capsule layer of CapNet ----------------------------------------------------------
# A vote is v_hat_j|i = w_gj u_i, with one w_gj for all P positions of a type g.  The method `votes`
# and the two functions above are the definition; the end of this file has the same without votes.

# torch 2.6 has no is_exporting
exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


class RoutedCapsules(nn.Module):
    """Every lower capsule votes for every higher one, and routing weights the votes.   [Sec. 2.1]

    The P capsules of a type share a transform (Fig. 1b); P = 1 gives each capsule its own.
    routing: "dynamic" (softmax over "in" or "out" capsules) or "em";  bias: votes are w u + bias
    b_init: initial logits of dynamic routing, "zero", "random" (drawn once), "learnable"  [Table 5]
        the last two store one logit per pair (i, j), so that inputs must have P = `positions`
    factored: route without computing votes (end of this file), with the same result.  Set False
        under torch.func and torch.compile(fullgraph=True); torch.export does so by itself
    gain: factor on the initial standard deviation, 0.3 sqrt(types / in_dim).  Deviation 8: the
        paper says "Gaussian"; with this |v| starts at 0.2 on average in Table 1's layer after one
        iteration, at 0.7 after three.  If the inputs differ between positions, their mean is about
        sqrt(P) times shorter: use gain=sqrt(P)
    u: (B, types, P, in_dim) -> v (B, out_capsules, out_dim)
    em: u, activation (B, types*P) -> pose (B, out_capsules, out_dim), activation (B, out_capsules)
    """

    def __init__(self, types, in_dim, out_capsules, out_dim, routing="dynamic", iterations=3, *,
                 softmax="in", bias=False, b_init="zero", positions=1, gain=1.0, factored=True):
        super().__init__()
        check_positive(iterations=iterations)
        check_choice(("dynamic", "em"), routing=routing)
        check_choice(("in", "out"), softmax=softmax)
        check_choice(("zero", "random", "learnable") if routing == "dynamic" else ("zero",),
                     b_init=b_init)
        self.types, self.in_dim, self.routing = types, in_dim, routing
        self.iterations, self.softmax, self.factored = iterations, softmax, factored
        std = 0.3 * gain * math.sqrt(types / in_dim)                     # deviation 8
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
        """v_hat_j|i = w_gj u_i: (B, types, P, in_dim) -> (B, types*P, out_capsules, out_dim)."""
        return torch.einsum("BGPe,Gejd->BGPjd", *self.u_and_weight(u)).flatten(1, 2)

    def u_and_weight(self, u):
        """u and the weight w; with a bias, u has a constant 1 appended, whose weight it is."""
        if self.bias is None:
            return u, self.weight
        return F.pad(u, (0, 1), value=1), torch.cat([self.weight, self.bias[:, None]], 1)

    def forward(self, u, activation=None):
        positions = {} if self.b is None else {"P": len(self.b) // self.types}
        check_shape("u", u, "B types P in_dim", types=self.types, in_dim=self.in_dim, **positions)
        if (activation is None) == (self.routing == "em"):
            raise ValueError("activation: needed with routing='em', and with it alone")
        # With fewer positions than min_positions explicit votes are faster (measured on a CPU).
        if self.routing == "dynamic":
            with_votes, without_votes, min_positions = dynamic_routing, dynamic_without_votes, 4
            options = {"softmax": self.softmax, "b0": self.b}
        else:
            with_votes, without_votes = em_routing, em_without_votes
            min_positions = (self.in_dim + 1) * (self.in_dim + 2) // 6
            options = {"activation": activation, "beta_v": self.beta_v, "beta_a": self.beta_a}
        # torch.export would unroll the loops over blocks, for one batch size.
        if self.factored and u.shape[2] >= min_positions and not exporting():
            v = without_votes(*self.u_and_weight(u), iterations=self.iterations, **options)
        else:
            v = with_votes(self.votes(u), iterations=self.iterations, **options)
        return v if self.routing == "dynamic" else tuple(x.to(u.dtype) for x in v)


# ---- capConv: approximate routing in one pass, by a master and an aide branch --------------------

def squash_image(s, types):
    """squash every capsule of an image (B, types*d, H, W)."""
    return squash(s.unflatten(1, (types, -1)), dim=2).flatten(1, 2)


class ComplementConv(nn.Module):
    """Convolution in which every capsule type sees all types but its own.   [Eq. (6)]

    weight: (types*out_dim, (types-1)*in_dim, k, k), input channels of the other types in order
    u: (B, types*in_dim, H, W) -> (B, types*out_dim, ceil(H/stride), ceil(W/stride))
    """

    def __init__(self, in_dim, out_dim, kernel_size, stride, types):
        super().__init__()
        self.types, self.stride, self.padding = types, stride, kernel_size // 2
        self.weight = nn.Conv2d((types - 1) * in_dim, types * out_dim, kernel_size).weight

    def dense(self):
        """The weight as an ordinary (types*out_dim, types*in_dim, k, k), own blocks zero."""
        G = self.types
        blocks = self.weight.unflatten(1, (G - 1, -1)).unflatten(0, (G, -1))
        zero = torch.zeros_like(blocks[0, :, :1])            # a type's weight for itself
        full = [torch.cat([block[:, :g], zero, block[:, g:]], 1) for g, block in enumerate(blocks)]
        return torch.stack(full).flatten(2, 3).flatten(0, 1)

    def forward(self, u):
        return F.conv2d(u, self.dense(), stride=self.stride, padding=self.padding)


class CapConv(nn.Module):
    """One layer of capsules, routed in a single pass.   [Eq. (6), Fig. 1c]

    For every capsule type g, at every position (* is a convolution):
        v1_g  = M_g * u_g                        master: type g alone, kernel k1 = kernel_size
        v2_g  = sum over h != g of A_gh * u_h    aide: all other types, kernel k2 = aide_kernel
        (m1_g, m2_g) = C_g * v1_g + D_g * v2_g + beta_g      3x3, one number each per position
        s_g   = m1_g v1_g + m2_g v2_g  (+ skip_g)  (+ residual_g)
        out_g = squash(ReLU(BatchNorm(s_g)))
    coefficients: "both", as above;  "own": m1 from v1 alone, m2 from v2;  "cross": m1 from v2, m2
        from v1;  "fixed": m1 = m2 = 1;  None: no aide, s = v1   [Table 3 (1-4)]
    skip: add an ordinary 3x3 convolution of u, in which all types meet;  residual: an image to add
        (EncapModule uses skip in the paper's "Type I" layers, residual in the last of "Type II")
    Deviation 2: the paper does not give k2; k1 + 2 matches its seconds per batch for (e) and (f) of
    Table 1.  The released code uses k1 + 4, lets the aide see its own type, squashes the branches.
    The paper gives neither size nor place of C, D and the skips; they are as logged and released.
    Deviation 6: beta is initialised to 1, so that a fresh layer adds its branches.
    Deviation 8: BatchNorm's weight is initialised to 1 / sqrt(out_dim).  With torch's default of 1,
    |s|^2 would be d / 2 after ReLU, and lengths would start at 0.30 for d = 2 but at 0.86 for d =
    16, where squash is nearly flat; now they start between 0.2 and 0.3.
    u: (B, types*in_dim, H, W) -> (B, types*out_dim, ceil(H/stride), ceil(W/stride))
    """

    def __init__(self, in_dim, out_dim, kernel_size, stride=1, types=32, coefficients="both",
                 aide_kernel=None, skip=False):
        super().__init__()
        aide_kernel = kernel_size + 2 if aide_kernel is None else aide_kernel        # deviation 2
        check_positive(types=types, kernel_size=kernel_size, aide_kernel=aide_kernel)
        if kernel_size % 2 == 0 or aide_kernel % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}, aide_kernel={aide_kernel}: must be odd")
        check_choice(("both", "own", "cross", "fixed", None), coefficients=coefficients)
        if coefficients is not None and types == 1:
            raise ValueError("types=1: must be 2 or more with an aide, which sees the other types")
        self.types, self.coefficients = types, coefficients
        low, high = types * in_dim, types * out_dim

        def per_type(c_in, c_out, k, stride=1, bias=False):
            return nn.Conv2d(c_in, c_out, k, stride, k // 2, groups=types, bias=bias)

        self.master = per_type(low, high, kernel_size, stride)
        if coefficients is not None:
            self.aide = ComplementConv(in_dim, out_dim, aide_kernel, stride, types)
        if coefficients in ("both", "own", "cross"):
            joint = coefficients == "both"                               # m1_g next to m2_g
            self.from_v1 = per_type(high, 2 * types if joint else types, 3, bias=True)
            self.from_v2 = per_type(high, 2 * types if joint else types, 3, bias=not joint)
            for convolution in (self.from_v1, self.from_v2):             # a sum needs one beta only
                if convolution.bias is not None:
                    nn.init.ones_(convolution.bias)                      # deviation 6
        self.skip = nn.Conv2d(low, high, 3, stride, padding=1, bias=False) if skip else None
        self.norm = nn.BatchNorm2d(high)
        nn.init.constant_(self.norm.weight, 1 / math.sqrt(out_dim))      # deviation 8

    def branches(self, u):
        """v1, v2 (B, types*d, H', W') and their coefficients m1, m2 (B, types, H', W')."""
        v1, v2 = self.master(u), self.aide(u)
        if self.coefficients == "fixed":
            m1 = m2 = torch.ones_like(v1[:, :self.types])
        elif self.coefficients == "both":
            joint = self.from_v1(v1) + self.from_v2(v2)
            m1, m2 = joint.unflatten(1, (self.types, 2)).unbind(2)
        elif self.coefficients == "own":
            m1, m2 = self.from_v1(v1), self.from_v2(v2)
        else:
            m1, m2 = self.from_v2(v2), self.from_v1(v1)
        return v1, v2, m1, m2

    def forward(self, u, residual=None):
        if self.coefficients is None:
            s = self.master(u)
        else:
            v1, v2, m1, m2 = (x.unflatten(1, (self.types, -1)) for x in self.branches(u))
            s = (m1 * v1 + m2 * v2).flatten(1, 2)                        # Eq. (6)
        if self.skip is not None:
            s = s + self.skip(u)
        if residual is not None:
            s = s + residual
        return squash_image(F.relu(self.norm(s)), self.types)


class CapFC(nn.Module):
    """Class capsules: component d is a weighted sum of component d of every u_i.   [Sec. 3.1]

    v_jd = squash over d of sum_i w[d, i, j] u_id, no bias.   u: (B, i, d) -> (B, j, d)
    """

    def __init__(self, in_capsules, dim, out_capsules):
        super().__init__()
        weight = torch.randn(dim, in_capsules, out_capsules) / math.sqrt(in_capsules)
        self.weight = nn.Parameter(weight)

    def forward(self, u):
        check_shape("u", u, "B i d", i=self.weight.shape[1], d=self.weight.shape[0])
        return squash(torch.einsum("Bid,dij->Bjd", u, self.weight))


# ---- Optimal transport between two batches of samples --------------------------------------------
# How far is one cloud of n points from another of m?  A plan P moves mass P_xy from x to y, at cost
# Q_xy per unit: <Q, P> = sum_xy P_xy Q_xy in all.  Every x gives 1/n, every y receives 1/m.  If eps
# times the entropy of P is subtracted from the cost, the cheapest plan is exp(-Q/eps) with its
# columns and rows rescaled in turn until their sums are right (Sinkhorn).

def normalise(z):
    """z / |z| along the last axis; 0 stays 0, with a finite gradient."""
    length = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    return z / torch.where(length > 0, length, 1.0)


@full_precision
def cosine_cost(x, y):
    """1 - cos(x, y), in [0, 2]; a zero vector costs 1 against anything.

    x: (..., n, d);  y: (..., m, d) -> (..., n, m)
    """
    return 1 - normalise(x) @ normalise(y).mT


@full_precision
def l2_cost(x, y):
    """Euclidean distance, unbounded; value and gradient are 0 where x = y.   [Table 3 (d5)]"""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


@full_precision
def sinkhorn_plan(Q, eps=0.1, iterations=10, q_max=None):
    """Entropic transport plan between two uniform clouds, L Sinkhorn iterations.  [Eqs. (9), (10)]

    Q: (..., n, m) ground cost;  eps: in the units of Q;  iterations: L
    q_max: a known upper bound of Q, or None.  If q_max <= 60 eps, as for the cosine cost at the
        paper's eps, exp(-Q/eps) cannot underflow in float32, and its columns and rows are scaled as
        in Eq. (9); otherwise the same iteration runs on logarithms.
    -> P (..., n, m): rows sum to 1/n exactly (scaled last), columns to 1/m as L grows
    Deviation 1: columns before rows, as printed; the released code begins with the rows.  Eq. (9)
    prints b(l+1) = 1 / (K a(l)); a(0) is undefined, so a(l+1) is meant.
    """
    check_positive(float, eps=eps)
    check_positive(iterations=iterations)
    n, m = Q.shape[-2:]
    if q_max is not None and q_max <= 60 * eps:             # e^-60 = 9e-27
        kernel = (-Q / eps).exp().reshape(-1, n, m)
        a = kernel.new_ones(kernel.shape[0], n, 1)                       # scales the rows
        for _ in range(iterations):                                      # Eq. (9)
            b = 1 / (m * a.mT @ kernel)                      # (., 1, m): columns sum to 1/m
            a = 1 / (n * kernel @ b.mT)                      # (., n, 1): rows sum to 1/n
        return (a * kernel * b).view(Q.shape)                            # Eq. (10)
    log_P = -Q / eps
    for _ in range(iterations):
        log_P = log_P.log_softmax(-2) - math.log(m)                      # columns sum to 1/m
        log_P = log_P.log_softmax(-1) - math.log(n)                      # rows sum to 1/n
    return log_P.exp()


@full_precision
def sinkhorn_divergence(x, y, eps=0.1, iterations=10, cost="cosine", bias_fix=True,
                        plan_grad=False):
    """How far two clouds of samples are from each other: 2 W(x,y) - W(x,x) - W(y,y).   [Eq. (11)]

    W is <Q, P> of Eq. (8) with the plan of Eqs. (9), (10).  W(x, x) is not 0, and W(x, y) alone is
    not least at y = x; the other terms correct that.  POT and geomloss return half of this.
    x: (..., n, d);  y: (..., m, d);  cost: "cosine" or "l2";  eps, iterations: as sinkhorn_plan
    bias_fix: False gives W(x, y) alone   [Table 3 (d1)]
    plan_grad: differentiate through the plan as well [Table 3 (d2)].  By default it is a constant:
        4.58 % error in the paper, 4.77 with the gradient, and no backward pass of L iterations.
    -> (...), in the units of the cost
    """
    check_choice(("cosine", "l2"), cost=cost)
    if cost == "cosine":                     # normalised here, once, as each cloud meets two others
        x, y = normalise(x), normalise(y)

    def ground_cost(x, y):
        return 1 - x @ y.mT if cost == "cosine" else l2_cost(x, y)

    def W(Q):
        q_max = 2.0 if cost == "cosine" else None
        plan = sinkhorn_plan(Q if plan_grad else Q.detach(), eps, iterations, q_max)
        return (Q * plan).sum((-2, -1))                                  # Eq. (8)

    if not bias_fix:
        return W(ground_cost(x, y))
    costs = ground_cost(x, y), ground_cost(x, x), ground_cost(y, y)
    # Clouds of equal size make one batched problem of the three.
    xy, xx, yy = W(torch.stack(costs)) if x.shape == y.shape else map(W, costs)
    return 2 * xy - xx - yy


@full_precision
def kl_divergence(real, generated):
    """KL(softmax(real) || softmax(generated)), mean over B.   [Table 3 (b)]   (B, F) -> scalar

    Deviation 7: the paper gives no formula.
    """
    check_shape("generated", generated, "B F", B=real.shape[0], F=real.shape[1])
    return F.kl_div(generated.log_softmax(-1), real.log_softmax(-1), log_target=True,
                    reduction="batchmean")


# ---- Feedback agreement: the lower layer must be reconstructible from the higher one -------------

def gather_ranks(x):
    """The samples (B, ...) of all ranks, (ranks*B, ...), differentiable.

    Each process ("rank") has B samples and computes the same divergence.  It sends gradients to its
    own samples only, times the number of ranks, since DistributedDataParallel averages over ranks.
    """
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ranks == 1:
        return x
    own = x.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(parts, own)
    parts[dist.get_rank()] = own + ranks * (x - own)         # value of x, gradient times ranks
    return torch.cat(parts)


def conv_bn(c_in, c_out, kernel_size=3, stride=1):
    """A list of convolution and BatchNorm."""
    return [nn.Conv2d(c_in, c_out, kernel_size, stride, kernel_size // 2, bias=False),
            nn.BatchNorm2d(c_out)]


class FeedbackUnit(nn.Module):
    """Divergence between real lower images and those generated from the higher ones.   [App. B]

    generator g:  high -> transposed 3x3 convolution, BatchNorm, ReLU, squash -> image like low
    extractor f:  image -> (3x3 convolution of stride 2, BatchNorm, ReLU) twice -> features (B, F)
    divergence between f(g(high)) and f(low)

    Its gradient trains the generator, the extractor and, through both images, the layers that
    computed low and high; only the transport plan is treated as a constant (unless plan_grad).
    low, high: channels;  stride: the step from low to high
    generator: "capsule", its convolution grouped by capsule type, or "vanilla", ungrouped and
        without squash [Table 3 (d4)], which networks without capsules use as well
    extractor: False compares raw pixels (d3);  divergence: "ot", or "kl" (b)
    cost, eps, iterations, bias_fix, plan_grad: of the transport, as sinkhorn_divergence
    forward: low (B, low, H, W), high (B, high, H', W') -> scalar
    Deviation 3: the generator has one group per type, as in the released code; App. B prints "the
    dimension of input capsules", which would mix types here.  The extractor runs once, on real and
    generated samples together, so that both share batch statistics.  Its stride is 1 where 2 would
    leave a single number, whose cosine has no gradient.
    """

    def __init__(self, low, high, types=32, stride=2, *, generator="capsule", extractor=True,
                 divergence="ot", cost="cosine", eps=0.1, iterations=10, bias_fix=True,
                 plan_grad=False):
        super().__init__()
        check_positive(iterations=iterations)
        check_positive(float, eps=eps)
        check_choice(("capsule", "vanilla"), generator=generator)
        check_choice(("ot", "kl"), divergence=divergence)
        check_choice(("cosine", "l2"), cost=cost)
        check_choice((True, False), extractor=extractor, bias_fix=bias_fix, plan_grad=plan_grad)
        self.types = types if generator == "capsule" else None
        self.divergence = divergence
        self.sinkhorn = dict(eps=eps, iterations=iterations, cost=cost, bias_fix=bias_fix,
                             plan_grad=plan_grad)
        self.deconv = nn.ConvTranspose2d(high, low, 3, stride, padding=1, bias=False,
                                         groups=self.types or 1)
        self.norm = nn.BatchNorm2d(low)
        hidden = max(1, low // 4)
        self.extractor = nn.ModuleList(
            [*conv_bn(low, hidden), *conv_bn(hidden, 1)]) if extractor else None

    def generate(self, high, size):
        """g: the lower image (B, low, H, W), of size (H, W), reconstructed from the higher one."""
        u = F.relu(self.norm(self.deconv(high, output_size=size)))
        return squash_image(u, self.types) if self.types else u

    def extract(self, image):
        """f: image (B, low, H, W) -> features (B, F).

        The cost has a trivial minimum: if a single feature is nonzero, the same one in all samples,
        every cosine is 1, and the cosine cost and its gradient are 0.
        """
        if self.extractor is None:
            return image.flatten(1)
        for conv, norm in (self.extractor[:2], self.extractor[2:]):
            stride = 2 if max(image.shape[-2:]) > 2 else 1               # deviation 3
            image = F.relu(norm(F.conv2d(image, conv.weight, None, stride, padding=1)))
        return image.flatten(1)

    def features(self, low, high):
        """Features of the real and of the generated lower images, each (B, F), of all ranks."""
        check_shape("high", high, "B high H W", B=low.shape[0])          # else chunk mixes the two
        real_and_generated = torch.cat([low, self.generate(high, low.shape[-2:])])
        real, generated = self.extract(real_and_generated).chunk(2)
        return gather_ranks(real), gather_ranks(generated)

    def forward(self, low, high):
        real, generated = self.features(low, high)
        if self.divergence == "kl":
            return kl_divergence(real, generated)
        return sinkhorn_divergence(generated, real, **self.sinkhorn)


# ---- The networks.  model(x) -> (scores (B, K), feedback scalar, 0 in eval mode or without units)

def conv_bn_relu(c_in, c_out, stride=1):
    return nn.Sequential(*conv_bn(c_in, c_out, 3, stride), nn.ReLU())


def capsules(image, types):
    """(B, G*d, H, W) -> (B, G, P, d), P = H*W."""
    return image.unflatten(1, (types, -1)).flatten(3).transpose(2, 3)


class Network(nn.Module):
    """What all networks share; each adds its stem, image -> image, and scores, image -> (B, K).

    sizes: other arguments that must be positive;  logits: whether scores are logits or lengths
    """

    logits = False

    def __init__(self, num_classes, in_channels, image_size, **sizes):
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels, image_size=image_size,
                       **sizes)
        self.input_sizes = {"C": in_channels, "H": image_size, "W": image_size}
        self.blocks, self.units, self.feedback = (), (), 0

    def add_units(self, feedback, channels, strides, **options):
        """feedback: units per module.  The first reconstructs the module's input from its output,
        the second the output of its first layer."""
        check_choice((0, 1, 2), feedback=feedback)
        self.units, self.feedback = nn.ModuleList(), feedback
        for low, high, stride in zip(channels[:-1], channels[1:], strides, strict=True):
            for c, step in ((low, stride), (high, 1))[:feedback]:
                self.units.append(FeedbackUnit(c, high, stride=step, **options))

    def walk(self, u):
        """Pass image u through all modules -> last image, a pair (low, high) for each unit."""
        pairs = []
        for module in self.blocks:
            first, v = module(u)
            pairs += [(u, v), (first, v)][:self.feedback]
            u = v
        return u, pairs

    def forward(self, x):
        check_shape("x", x, "B C H W", **self.input_sizes)
        u, pairs = self.walk(self.stem(x))
        feedback = u.new_zeros(())
        if self.training:
            for unit, (low, high) in zip(self.units, pairs, strict=True):
                feedback = feedback + unit(low, high)
        return self.scores(u), feedback


class EncapModule(nn.Module):
    """One capConv that raises the dimension, then `depth` that keep it.   [Fig. 3a, Table 2]

    The paper calls the first "Type I", the others "Type II", kinds of layers, not capsule types.
    u -> the images after the first layer and after the last
    """

    def __init__(self, in_dim, out_dim, depth, stride, skip, **options):
        super().__init__()
        self.type_II_skip = skip in ("both", "II")
        self.type_I = CapConv(in_dim, out_dim, 3, stride, skip=skip in ("both", "I"), **options)
        self.type_II = nn.ModuleList(CapConv(out_dim, out_dim, 1, **options) for _ in range(depth))

    def forward(self, u):
        first = v = self.type_I(u)
        for layer in self.type_II[:-1]:
            v = layer(v)
        return first, self.type_II[-1](v, residual=first if self.type_II_skip else None)


class EncapNet(Network):
    """Convolution, capConv modules, capFC.   [Table 2]

    depths: Type II layers of each module, N in Table 2;  dims: capsule dimensions, of the stem and
        of each module;  types: capsule types
    coefficients, aide_kernel: as CapConv; coefficients also one per module
    skip: "both", "I", "II" or None [Table 3 (5-7)];  stem_stride: use 4 for images of 128 or more
    feedback: units per module, 0, 1, 2;  further keywords go to FeedbackUnit
    Deviation 9: the stem M0 is convolution, BatchNorm, ReLU, not squashed; the vanilla generator of
    Table 3 (d4) keeps BatchNorm and ReLU and drops grouping and squash.
    """

    def __init__(self, num_classes=10, in_channels=3, image_size=32, *, depths=(3, 3, 3, 3),
                 dims=(1, 2, 4, 8, 16), types=32, coefficients="both", aide_kernel=None,
                 skip="both", stem_stride=1, feedback=0, **unit_options):
        super().__init__(num_classes, in_channels, image_size, types=types, depths=depths,
                         dims=dims, stem_stride=stem_stride)
        check_choice(("both", "I", "II", None), skip=skip)
        check_tuple(depths=depths, dims=dims)
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
            EncapModule(low, high, depth, stride, skip, types=types, coefficients=c,
                        aide_kernel=aide_kernel)
            for low, high, depth, stride, c in zip(
                dims[:-1], dims[1:], depths, strides, coefficients, strict=True))
        self.add_units(feedback, [types * d for d in dims], strides, types=types, **unit_options)
        side = math.ceil(image_size / (stem_stride * math.prod(strides)))
        self.classes = CapFC(types * side ** 2, dims[-1], num_classes)

    def scores(self, u):
        return self.classes(capsules(u, self.types).flatten(1, 2)).norm(dim=-1)


def six_layer_stem(in_channels, types):
    """Four convolutions -> (B, 8*types, ceil(H/4), ceil(W/4)).   [App. A.i]

    App. A prints "stride and padding is 3 and 1", which means kernel 3, padding 1.
    """
    channels = (in_channels, types, 2 * types, 4 * types, 8 * types)
    return nn.Sequential(*map(conv_bn_relu, channels[:-1], channels[1:], (1, 1, 2, 2)))


class EncapNet6(Network):
    """Table 1 (e), (f): four convolutions, a capConv 8 -> 16 from 8x8 to 4x4, capFC.   [App. A.i]

    Deviation 11: stride 2 and the skip come from the authors' logs, not from the paper; with them
    (e) has the parameters that Table 1 prints (25.8 Mb, 16 bits per parameter).
    """

    def __init__(self, num_classes=10, in_channels=3, image_size=32, *, types=32,
                 coefficients="both", aide_kernel=None, skip=True):
        super().__init__(num_classes, in_channels, image_size, types=types)
        self.types = types
        self.stem = six_layer_stem(in_channels, types)
        self.capconv = CapConv(8, 16, 3, stride=2, types=types, coefficients=coefficients,
                               aide_kernel=aide_kernel, skip=skip)
        self.classes = CapFC(types * math.ceil(image_size / 8) ** 2, 16, num_classes)

    def scores(self, u):
        return self.classes(capsules(self.capconv(u), self.types).flatten(1, 2)).norm(dim=-1)


class CapNet(Network):
    """Table 1 (a), (b): four convolutions, 2,048 capsules of 8 -> as many of 16 -> K of 16.

    routing, iterations, softmax, b_init, factored: as RoutedCapsules
    Deviation 11: both routed layers have a bias, as the logged number of parameters implies.
    Deviation 10: the activation of a lower capsule of EM is the sigmoid, not the released ReLU, of
    BatchNorm of a 3x3 convolution; a class score is |squash(mu)|, not the activation.
    """

    def __init__(self, num_classes=10, in_channels=3, image_size=32, *, types=32, routing="dynamic",
                 iterations=3, softmax="in", b_init="zero", factored=True):
        super().__init__(num_classes, in_channels, image_size, types=types)
        self.types, self.routing = types, routing
        self.stem, side = six_layer_stem(in_channels, types), math.ceil(image_size / 4)
        options = dict(routing=routing, iterations=iterations, softmax=softmax, b_init=b_init,
                       factored=factored, positions=side ** 2, bias=True)
        self.routed = nn.ModuleList([
            RoutedCapsules(types, 8, types * side ** 2, 16, **options),
            RoutedCapsules(types, 16, num_classes, 16, gain=side, **options)])  # deviation 8
        if routing == "em":
            self.activation = nn.Sequential(*conv_bn(8 * types, types), nn.Sigmoid())

    def scores(self, image):
        first, last = self.routed
        u = capsules(image, self.types)                                  # (B, G, P, 8)
        if self.routing == "em":
            pose, a = first(u, self.activation(image).flatten(1))        # (B, G*P, 16), (B, G*P)
            v = squash(last(pose.unflatten(1, u.shape[1:3]), a)[0])      # scores are lengths
        else:
            v = last(first(u).unflatten(1, u.shape[1:3]))
        return v.norm(dim=-1)


class CNN(Network):
    """Table 1 (c), (d): five convolutions, average pooling, a linear layer.   [App. A.i]

    channels: of the five convolutions;  width: factor on them
    Deviation 11: the channels of (d) are those of the authors' logs; the paper prints none.
    """

    logits = True

    def __init__(self, num_classes=10, in_channels=3, image_size=32, *,
                 channels=(32, 64, 128, 256, 512), width=1.0):
        super().__init__(num_classes, in_channels, image_size, channels=channels)
        check_tuple(channels=channels)
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
    """The residual network whose modules have EncapNet's shapes.   [Table 2]

    blocks: n of each module, 2 + 2 sum(n) layers;  width: factor on 32, 64, 128, 256, 512 channels
    feedback: units per module, 0, 1, 2;  generator and further keywords go to FeedbackUnit
    """

    logits = True

    def __init__(self, num_classes=10, in_channels=3, image_size=32, *, blocks=(2, 2, 2, 2),
                 width=1.0, feedback=0, generator="vanilla", **unit_options):
        super().__init__(num_classes, in_channels, image_size, blocks=blocks)
        check_tuple(blocks=blocks)
        check_positive(float, width=width)
        channels = [max(1, round(width * 32)) * 2 ** k for k in range(len(blocks) + 1)]
        strides = (1,) + (2,) * (len(blocks) - 1)
        self.stem = conv_bn_relu(in_channels, channels[0])
        self.blocks = nn.ModuleList(
            map(ResidualModule, channels[:-1], channels[1:], blocks, strides))
        self.add_units(feedback, channels, strides, generator=generator, **unit_options)
        self.classes = nn.Linear(channels[-1], num_classes)

    def scores(self, u):
        return self.classes(u.mean((2, 3)))


# ---- Registry: a model is a class and the keywords that make it ----------------------------------

class Model(NamedTuple):
    """A network's class, its keywords, and its number of parameters for 10 classes and RGB images
    of this size, feedback units included."""

    network: type
    keywords: dict
    parameters: int
    image_size: int = 32


V2 = dict(depths=(23, 24, 24, 24), coefficients=(None, None, "both", "both"), stem_stride=4,
          feedback=2)
SMALL = dict(depths=(1, 1, 1), dims=(2, 4, 8, 16), types=8, stem_stride=2, feedback=1,
             aide_kernel=3)                                  # 3x3: faster on a CPU

MODELS = {
    "encapnet": Model(EncapNet, dict(feedback=2), 16_333_608),               # v1, 18 layers
    "encapnet-v2": Model(EncapNet, V2, 76_369_768, image_size=128),          # 101 layers
    "encapnet-v3": Model(EncapNet, V2, 76_538_728, image_size=224),          # v2 on larger images
    "encapnet-small": Model(EncapNet, SMALL, 428_362),                       # train.py's default
    "encapnet6": Model(EncapNet6, dict(coefficients="both"), 4_881_248),     # Table 1 (f)
    "encapnet6-master": Model(EncapNet6, dict(coefficients=None), 1_688_352),            # (e)
    "capnet-dynamic": Model(CapNet, dict(routing="dynamic"), 9_913_120),                 # (a)
    "capnet-em": Model(CapNet, dict(routing="em"), 9_991_028),                           # (b)
    "cnn-same": Model(CNN, {}, 1_574_698),                                               # (c)
    "cnn-similar": Model(CNN, dict(channels=(32, 256, 512, 512, 1300)), 9_622_170),      # (d)
    "resnet18": Model(ResNet, dict(blocks=(2, 2, 2, 2)), 11_156_778),        # Tables 2, 3
}


def keywords(cls):
    """Names of the keywords that a network takes, with FeedbackUnit's if it forwards them."""
    parameters = inspect.signature(cls).parameters
    names = {name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    return names | keywords(FeedbackUnit) if "unit_options" in parameters else names


def build(name, num_classes=10, in_channels=3, image_size=None, **overrides):
    """A network of the paper by name.   [Tables 1, 2, 3, 5]

    overrides: keywords of its class or of FeedbackUnit, as in build("encapnet", skip="I")
    image_size: None uses the registered size
    -> model;  model(x (B, in_channels, image_size, image_size)) -> scores (B, K), feedback ()
    """
    check_choice(tuple(MODELS), name=name)
    cls, defaults, _, usual_size = MODELS[name]
    unknown = set(overrides) - keywords(cls)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: must be one of "
                         f"{', '.join(sorted(keywords(cls)))} for {name}")
    image_size = usual_size if image_size is None else image_size
    return cls(num_classes, in_channels, image_size, **{**defaults, **overrides})


# ---- Appendix: routing without votes -------------------------------------------------------------
# Dynamic routing uses votes in two sums only, for b and for s.  With V_j the sum of v_j over the
# iterations so far,
#     b_ij = b0_ij + v_hat_ij . V_j = b0_ij + u_i . query_gj,    query_gj = w_gj^T V_j
#     s_j  = sum_i c_ij w_gj u_i         = sum_g w_gj (sum_p c_ij u_i)
# so agreement is an inner product with u_i itself, and inputs are pooled before they are mapped.
#
# EM.  The M-step takes three moments of the votes of higher capsule j, with r_i = R_ij a_i:
#     mass = sum_i r_i
#     mean = sum_i r_i vote_i / mass
#     var  = sum_i r_i (vote_i - mean)^2 / mass
# With u_i = centre_g + x_i, where centre_g is the mean of a type's capsules, a vote is
#     vote_i = vote_g + w_gj x_i,   vote_g = w_gj centre_g
# so the moments need three sums per type, over its positions: T0 = sum r, T1 = sum r x and
# T2 = sum r x x^T.  With delta_g = vote_g - mean
#     mass = sum_g T0
#     mean = sum_g (T0 vote_g + w T1) / mass
#     var  = sum_g (diag(w T2 w^T) + 2 delta_g w T1 + T0 delta_g^2) / mass
# In the E-step, the distance of a vote from the last mean is also a polynomial in x:
#     sum_d (vote_i - mean)^2 h = sum_d ((w x)^2 + 2 delta_g (w x) + delta_g^2) h,  h = 1 / (2 var)
#
# Both work in blocks, recomputed in the backward pass, so that neither the votes nor (but with the
# softmax over j) the n_in x n_out coefficients of Table 1's layer are ever stored at once.

BLOCK = 2 ** 20                      # about how many elements the largest array has; EM's up to 4x
checkpoint = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False,
                     preserve_rng_state=False)


def pool(u, query, b0, softmax):
    """sum_p c_ij u_i:  u (B, G, P, e), query (B, G, e, j) -> (B, G, e, j)"""
    b = u @ query + b0                                                   # (B, G, P, j)
    if softmax == "out":
        return u.mT @ b.softmax(-1)
    c = (b - b.detach().amax((1, 2), keepdim=True)).exp()
    return u.mT @ c / c.sum((1, 2), keepdim=True)                        # e*j divisions, not P*j


def dynamic_iterations(u, weight, b0, iterations, softmax):
    """dynamic_routing of a block of samples and higher capsules.

    u: (B, G, P, e);  weight: (G, e, j, d);  b0: (G, P, j) -> v (B, j, d)
    """
    B, G, P, e = u.shape
    weight = weight.permute(2, 0, 1, 3).flatten(1, 2)                    # (j, G*e, d)
    query, V = u.new_zeros(B, G, e, len(weight)), 0
    for t in range(iterations):
        pooled = pool(u, query, b0, softmax).flatten(1, 2).permute(2, 0, 1)    # (j, B, G*e)
        v = squash(pooled @ weight)                                      # (j, B, d)
        if t < iterations - 1:
            V = V + v
            query = (V @ weight.mT).permute(1, 2, 0).unflatten(1, (G, e)).contiguous()
    return v.transpose(0, 1)


@torch.compiler.disable                                      # torch.compile would unroll its loops
def dynamic_without_votes(u, weight, iterations=3, softmax="in", b0=None):
    """dynamic_routing of the votes w u.   u: (B, G, P, e);  weight: (G, e, j, d) -> v (B, j, d)

    With the softmax over i this is iterated attention: queries v_j, keys and values u_i.  Then
    higher capsules never interact, and are split into blocks, as samples are; over j they compete
    and stay together.
    """
    G, P, n_out = *u.shape[1:3], weight.shape[2]
    b0 = u.new_zeros(G, P, 1).expand(G, P, n_out) if b0 is None else b0.unflatten(0, (G, P))
    per_block = min(64, n_out) if softmax == "in" else n_out             # higher capsules
    samples = max(1, BLOCK // (per_block * G * P))
    blocks = list(zip(weight.split(per_block, 2), b0.split(per_block, 2), strict=True))
    return torch.cat([
        torch.cat([checkpoint(dynamic_iterations, part, *block, iterations, softmax)
                   for block in blocks], 1) for part in u.split(samples)])


def products(x, dim, double):
    """Of (x1, x2): x1^2, x1 x2, x2^2, along an axis dim < 0; mixed ones times `double`."""
    size = x.shape[dim]
    a, b = torch.triu_indices(size, size, device=x.device)
    scale = torch.where(a < b, double, 1).to(x).view(-1, *[1] * (-1 - dim))
    return x.index_select(dim, a) * x.index_select(dim, b) * scale


def em_moments(monomials, log_a, centre, weight, mean=None, var=None, log_aj=None):
    """E-step, then the moments of the new assignment, over the votes of some types; see above.

    monomials: (B, g, f, P), the x_a x_b, x_a and 1 of x = u - centre
    log_a: (B, g, P, 1);  centre: (B, g, e);  weight: (j, e, g, d)
    mean, var (B, j, d), log_aj (B, j): of the last M-step, or None: R is uniform
    -> over these types log mass (B, j), mean (B, j, d), var (B, j, d)
    """
    n_out, e = weight.shape[:2]
    weight2 = products(weight, -3, 2)                                    # (j, e(e+1)/2, g, d)
    vote = torch.einsum("jegd,Bge->Bgjd", weight, centre)                # of the centres
    if mean is None:
        log_r = log_a - math.log(n_out)                                  # (B, g, P, 1)
    else:
        delta, h = vote - mean[:, None], 1 / (2 * var)
        distance = monomials.mT @ torch.cat([                            # (B, g, P, j)
            torch.einsum("jqgd,Bjd->Bgqj", weight2, h),
            torch.einsum("jegd,Bgjd->Bgej", weight, 2 * delta * h[:, None]),
            (delta.square() * h[:, None]).sum(-1)[:, :, None]], 2)
        log_p = -(2 * math.pi * var).log().sum(-1)[:, None, None] / 2 - distance
        log_r = (log_aj[:, None, None] + standardise(log_p)).log_softmax(-1) + log_a     # Eq. (3)
    top = log_r.detach().amax((1, 2), keepdim=True)       # (B, 1, 1, j), j = 1 while R is uniform
    r = (log_r - top).exp()
    sums = (monomials @ r).expand(-1, -1, -1, n_out)                     # (B, g, f, j)
    T2, T1, T0 = sums.split((sums.shape[2] - e - 1, e, 1), 2)
    mass = T0.sum(1)[:, 0, :, None]                                      # (B, j, 1), at least 1
    T0 = T0.movedim(2, 3)                                                # (B, g, j, 1)
    w_T1 = torch.einsum("jegd,Bgej->Bgjd", weight, T1)
    mean = (T0 * vote + w_T1).sum(1) / mass
    delta = vote - mean[:, None]
    w_T2_w = torch.einsum("jqgd,Bgqj->Bjd", weight2, T2)
    var = (w_T2_w + (delta * (2 * w_T1 + T0 * delta)).sum(1)) / mass
    return mass[..., 0].log() + top[:, 0, 0], mean, var


def em_merge(log_mass, means, var):
    """Moments over all types from those over some, stacked: (parts, B, j), (parts, B, j, d) twice.

    -> log mass (B, j), mean and var (B, j, d)
    """
    share = log_mass.softmax(0)[..., None]                               # (parts, B, j, 1)
    mean = (share * means).sum(0)
    var = (share * (var + (means - mean).square())).sum(0)               # law of total variance
    return log_mass.logsumexp(0), mean, var.clamp_min(0) + 1e-8


@torch.compiler.disable                                      # torch.compile would unroll its loops
@full_precision
def em_without_votes(u, weight, activation, beta_v, beta_a, iterations=3):
    """em_routing of the votes w u.   u: (B, G, P, e);  weight: (G, e, j, d);  activation: (B, G*P)

    -> pose (B, j, d), activation (B, j), by blocks of samples and of types
    """
    B, G, P, e = u.shape
    n_out, d = weight.shape[2:]
    n_monomials = (e + 1) * (e + 2) // 2
    types_per_block = min(G, max(1, 4 * BLOCK // (n_out * d * n_monomials)))
    samples = max(1, 2 * BLOCK // (max(n_out, n_monomials) * P * types_per_block))
    if B > samples:
        parts = [checkpoint(em_without_votes, x, weight, a, beta_v, beta_a, iterations)
                 for x, a in zip(u.split(samples), activation.split(samples), strict=True)]
        return tuple(map(torch.cat, zip(*parts, strict=True)))
    centre = u.mean(2)
    x = (u - centre[:, :, None]).mT                                      # (B, G, e, P)
    monomials = torch.cat([products(x, -2, 1), x, torch.ones_like(x[:, :, :1])], 2)
    log_a = activation.clamp_min(torch.finfo(u.dtype).tiny).log().view(B, G, P, 1)
    inputs = (t.split(types_per_block, 1) for t in (monomials, log_a, centre))
    weights = weight.permute(2, 1, 0, 3).split(types_per_block, 2)       # (j, e, g, d)
    blocks = list(zip(*inputs, weights, strict=True))
    last_m_step = ()                                         # before the first R is uniform
    for t in range(iterations):
        # stacked, not a list: an outer checkpoint drops an inner one's tensors, nothing else
        log_mass, mean, var = checkpoint(em_merge, *map(torch.stack, zip(
            *(checkpoint(em_moments, *block, *last_m_step) for block in blocks), strict=True)))
        log_aj = em_activation(log_mass, var, beta_v, beta_a, t)
        last_m_step = mean, var, log_aj
    return mean, log_aj.exp()
