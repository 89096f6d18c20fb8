"""What is measured of a run's network: errors, agreement of votes, what its units distinguish."""
import torch
import torch.distributed as dist
import torch.nn.functional as F

from lab.config import DATASETS
from lab.data import normalised, views
from lab.runtime import rank, world


def forward(model, config, x):
    """The model under the Config's precision and memory format."""
    if config.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=config.amp):
        scores, feedback = model(x)
    return scores.float(), feedback.float()


def class_scores(run, x):
    """Class scores (B, K) of images (B, C, H, W) in [0, 1]."""
    return forward(run.net, run.config, normalised(x, run.data))[0]


@torch.no_grad()
def count_hits(run, multi_crop=False):
    """Of the whole test set, each image counted once however many the processes.

    -> (K, 3), of each class: right first answers, right among the first five, images; on the device
    """
    data, mirror = run.data, DATASETS[run.config.dataset].flips
    mine = torch.arange(rank(), len(data.test), world(), device=run.device)
    hits = torch.zeros(len(data.classes), 3, dtype=torch.long, device=run.device)
    run.net.eval()
    for t in run.net.buffers() if world() > 1 else ():    # moments of BatchNorm: those saved
        dist.broadcast(t, 0)
    chunks = mine.split(run.config.batch_size)
    for images, labels, _ in data.test.batches(chunks, run.device, run.config.workers):
        scores = [class_scores(run, x) for x in views(images, data.side, multi_crop, mirror)]
        scores = sum(s.softmax(1) if run.net.logits else s for s in scores)
        right = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
        found = torch.stack([right[:, 0], right.any(1), torch.ones_like(right[:, 0])], 1)
        hits.index_add_(0, labels, found.long())
    if world() > 1:
        dist.all_reduce(hits)
    return hits


def evaluate(run, multi_crop=False):
    """Errors in % -> {"error": top-1, "top5_error":, "images": their number, "class_errors":}"""
    hits = count_hits(run, multi_crop)
    top1, top5, n = hits.sum(0).tolist()
    classes = {name: 100 * (seen - right) / seen if seen else None
               for name, (right, _, seen) in zip(run.data.classes, hits.tolist(), strict=True)}
    return {"error": 100 * (n - top1) / n, "top5_error": 100 * (n - top5) / n, "images": n,
            "class_errors": classes}


def unbalanced(labels):
    """Whether some class has twice as many images as another."""
    number = labels.unique(return_counts=True)[1]
    return (number.max() >= 2 * number.min()).item()


def chance_error(run):
    """Test error in % of always naming the class that most training images are of."""
    usual = run.data.train.labels.bincount().argmax()
    return 100 * (run.data.test.labels != usual).double().mean().item()


def at_chance(run, error):
    return error > 0.95 * chance_error(run)


def input_and_output(layer, function, *arguments):
    """What goes into a layer and what comes out, of EM the poses, during function(*arguments)."""
    seen = []
    hook = layer.register_forward_hook(lambda layer, given, out: seen.extend((given[0], out)))
    function(*arguments)
    hook.remove()
    u, v = seen
    return u, v[0] if isinstance(v, tuple) else v


@torch.no_grad()
def agreement(net, x, labels, bins=20):
    """Cosine of the true class's capsule v_j and its votes, in the last routed layer.   [Fig. 2]

    -> {"percent": of the votes in each of `bins` bins over [-1, 1], "length": their mean length}
    """
    layer, b = net.routed[-1], torch.arange(len(x), device=x.device)
    u, v = input_and_output(layer, net.eval(), x)
    votes = layer.votes(u)[b, :, labels]                                 # (B, i, d)
    cosine = F.cosine_similarity(                         # a fresh v is shorter than 1e-8
        votes, v[b, labels].unsqueeze(1), dim=-1, eps=1e-30)             # (B, i)
    place = ((cosine + 1) / 2 * bins).long().clamp(0, bins - 1).flatten().cpu()
    number = torch.bincount(place, minlength=bins).double()
    length = torch.bincount(place, votes.norm(dim=-1).flatten().double().cpu(), minlength=bins)
    return {"percent": (100 * number / number.sum()).tolist(),
            "length": (length / number.clamp(min=1)).tolist()}


def images_at(run, index):
    """Test images (n, C, H, W) in [0, 1] as the network sees them, and labels, of these places."""
    images, labels, _ = next(run.data.test.batches([index.to(run.device)], run.device))
    return next(views(images, run.data.side, False, False)), labels


def first_images(run, n):
    return images_at(run, torch.arange(min(n, len(run.data.test))))


def variance_between_samples(unit, low):
    """Share of variance between samples in the features that a feedback unit extracts.

    Of their directions z, which are all that the cosine cost sees: 1 - |mean z|^2 / mean |z|^2.
    Towards 1: features distinguish samples; 0: all samples look alike, the trivial minimum.
    low: (B, low, H, W), in eval mode, or BatchNorm's averages move -> scalar, in [0, 1)
    """
    z = F.normalize(unit.extract(low).float())                           # (B, F)
    square = z.square().sum(1).mean()
    return (1 - z.mean(0).square().sum() / square.clamp_min(1e-12)) * (square > 0)


def spread_images(run, n):
    """n test images (n, C, H, W) in [0, 1] and labels (n,), spread over the whole test set."""
    last = len(run.data.test) - 1
    return images_at(run, torch.linspace(0, last, min(n, last + 1)).long())


@torch.no_grad()
def answered_images(run, n):
    """n test images in [0, 1], spread over all of them, the network's answers, the labels."""
    x, labels = spread_images(run, n)
    run.net.eval()
    answers = class_scores(run, x).argmax(1)
    return x.cpu(), answers.tolist(), labels.tolist()


def true_capsules(run, x, labels):
    """The capsule of each image's true class, whose length is the score: (B, d)."""
    layer, parts = getattr(run.net, "classes", None) or run.net.routed[-1], []
    for part, label in zip(x.split(250), labels.split(250), strict=True):
        _, v = input_and_output(layer, class_scores, run, part)
        parts.append(v[torch.arange(len(v)), label])
    return torch.cat(parts).cpu().double()


def explained_variance(z, factors, labels):
    """Share of each factor's variance that a linear fit on z explains, mean over classes.

    z: (B, F);  factors: (B, f) -> all of z, on held-out images (f,);  each of z alone (f, F)
    """
    together, alone = [], []
    for k in labels.unique():
        x, y = z[labels == k], factors[labels == k].double()
        x, y = x - x.mean(0), y - y.mean(0)
        # Where a capsule never uses a dimension, gelsd's rank cut leaves it alone.
        w = torch.linalg.lstsq(x[::2], y[::2], driver="gelsd").solution
        rest = y[1::2] - x[1::2] @ w
        together.append(1 - rest.square().mean(0) / y[1::2].square().mean(0))
        alone.append(F.cosine_similarity(y.T[:, None], x.T, dim=2, eps=1e-15).square())
    return torch.stack(together).mean(0).clamp(min=0), torch.stack(alone).mean(0)


def correlation(a, b):
    """Correlation of images (B, ...) with their counterparts, mean over B."""
    a, b = (z.flatten(1) - z.flatten(1).mean(1, keepdim=True) for z in (a, b))
    return F.cosine_similarity(a, b).mean().item()
