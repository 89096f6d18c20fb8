"""The paper's tables and figures, and studies of ours, as data: rows are changes to Config."""
from typing import NamedTuple

import encapnet
from lab.config import make_config, merge

# ---- Tables --------------------------------------------------------------------------------------

class Part(NamedTuple):
    """A table or a block of it: base, columns and rows are changes to Config, a cell all three."""

    title: str
    base: dict
    columns: dict          # name: changes
    rows: list             # (name, changes, {column: the paper's error in %})
    own_data: bool = False           # stays on its data set when --dataset asks for another
    study: bool = False              # ours, not the paper's: every cell is run, nothing beside it


def model_row(name, **keywords):
    return dict(model=name, set=keywords)


def study(title, base, columns, rows, own_data=False):
    """A part without the paper's numbers.   rows: {name: changes}"""
    return Part(title, base, columns, [(*row, {}) for row in rows.items()], own_data, study=True)


CIFAR10, MNIST = dict(dataset="cifar10"), dict(dataset="mnist")
SETS = ("cifar10", "cifar100", "svhn")
CAPNET = {"CapNet": model_row("capnet-dynamic")}
LOSSES = {"spread, fix m": "spread-fixed", "spread": "spread", "margin": "margin", "CE loss": "ce"}
OPTIMIZERS = {name: dict(optimizer=name.lower()) for name in ("RMSProp", "SGD", "Adam")}
DEEP = dict(feedback=0, coefficients="both", skip="both")    # Table 3's EncapNet without a unit
TABLES = {
    "1": [Part("six-layer networks", {}, {"cifar10": CIFAR10, "mnist": MNIST}, [
        (name, model_row(model), {"cifar10": cifar10, "mnist": mnist, "cost": cost})
        # cost: the paper's Mb of parameters, MB of memory at this batch, s a batch on a Titan X
        for name, model, cifar10, mnist, cost in (
            ("(a) CapNet, dynamic", "capnet-dynamic", 14.28, 0.37, (151.24, 3961, 8, 0.444)),
            ("(b) CapNet, EM", "capnet-em", 12.66, 0.31, (152.44, 10078, 4, 0.957)),
            ("(c) vanilla CNN, same shape", "cnn-same", 14.43, 0.38, (24.44, 1652, 128, 0.026)),
            ("(d) vanilla CNN, similar param", "cnn-similar", 12.09, 0.33,
             (146.88, 2420, 128, 0.146)),
            ("(e) EncapNet, master", "encapnet6-master", 13.87, 0.31, (25.76, 1433, 128, 0.039)),
            ("(f) EncapNet, master/aide", "encapnet6", 11.93, 0.25, (60.68, 1755, 128, 0.061)))])],
    "2": [],                                    # architectures: no runs
    "3": [Part("capConv design", CIFAR10, {"EncapNet": model_row("encapnet", **DEEP)}, [
        (name, dict(set=changes), {"EncapNet": error}) for name, changes, error in (
            ("(1) master (baseline)", dict(coefficients=None, skip=None), 9.83),
            ("(2) master/aide v1", dict(coefficients="own", skip=None), 8.05),
            ("(3) master/aide v2", dict(coefficients="cross", skip=None), 9.11),
            ("(4) master/aide v3", dict(skip=None), 7.41),
            ("(5) skip on Type I", dict(skip="I"), 6.81),
            ("(6) skip on Type II", dict(skip="II"), 6.75),
            ("(7) skip both", {}, 5.82),
            ("(8) two OTs", dict(feedback=2), 4.55))
    ]), Part("regularization", CIFAR10,
             {"EncapNet": model_row("encapnet", **DEEP), "ResNet": model_row("resnet18")}, [
        (name, dict(set=changes), dict(EncapNet=ours, ResNet=resnet))
        for name, changes, ours, resnet in (
            ("(a) capConv block (baseline)", dict(feedback=0), 5.82, 8.03),
            ("(b) KL loss", dict(feedback=1, divergence="kl"), 5.31, 7.72),
            ("(c) OT loss", dict(feedback=1), 4.58, 7.67),
            ("(d1) remove bias fix", dict(feedback=1, bias_fix=False), 4.71, None),
            ("(d2) do BP in P_L", dict(feedback=1, plan_grad=True), 4.77, None),
            ("(d3) no extractor", dict(feedback=1, extractor=False), 5.79, None),
            ("(d4) use vanilla g", dict(feedback=1, generator="vanilla"), 5.01, None),
            ("(d5) use l2 in Q", dict(feedback=1, cost="l2"), 4.90, None))
    ]), study("what the paper leaves open, beside (7) and (c)", CIFAR10,
              {"EncapNet": model_row("encapnet", **DEEP)}, {
        **{f"aide kernel {k} in both types": dict(set=dict(aide_kernel=k)) for k in (3, 7)},
        "both coefficients fixed at 1": dict(set=dict(coefficients="fixed")),
        **{f"OT loss, lambda {lam:g}": dict(lam=lam, set=dict(feedback=1))
           for lam in (0.1, 1.0)},                                        # (c) has 10
        "OT loss, lambda 20, l2, eps 1, vanilla g, as in most of the logs": dict(
            lam=20.0, set=dict(feedback=1, cost="l2", eps=1.0, generator="vanilla"))})],
    "4": [Part("comparison; the paper's mean ± std: ++ on CIFAR-10 3.56 ± 0.12 and SVHN "
               "1.87 ± 0.11, + on CIFAR-100 24.85 ± 0.11", model_row("encapnet"),
             {name: dict(dataset=name) for name in SETS},
             [(f"EncapNet{a}", dict(augment=a or "none"), dict(zip(SETS, p, strict=True)))
              for a, *p in (("", 4.55, 26.77, 2.01), ("+", 3.13, 24.01, 1.64),
                            ("++", 3.10, 24.18, 1.52))]),
        Part("h-ImageNet, top-1", dict(dataset="h-imagenet"), {"h-ImageNet": {}}, [
            (name, dict(model=model, image_size=side, augment=augment), {"h-ImageNet": error})
            for name, model, side, augment, error in (
                ("EncapNet v1", "encapnet", 128, "none", 48.23),
                ("EncapNet v2", "encapnet-v2", 128, "none", 43.15),
                ("EncapNet v3", "encapnet-v3", 224, "none", 42.76),
                ("EncapNet v3+", "encapnet-v3", 224, "+", 40.18),
                ("EncapNet v3++", "encapnet-v3", 224, "++", 40.05),
                ("WRN", "wide_resnet101_2", 224, "++", 42.51),
                ("ResNet-101", "resnet101", 224, "++", 44.13), ("VGG", "vgg16", 224, "++", 55.76),
                ("GoogleNet", "googlenet", 224, "++", 60.18))], own_data=True),
        Part("complete ImageNet, top-5", dict(dataset="imagenet", augment="++"), {"ImageNet": {}}, [
            (name, model_row(model), {"ImageNet": error}) for name, model, error in (
                ("EncapNet-18", "encapnet", 7.51), ("GoogleNet", "googlenet", 7.89),
                ("VGG", "vgg16", 8.43), ("ResNet-101", "resnet101", 6.21))],
            own_data=True)],
    "5": [Part("routing iterations, CapNet (dynamic)", CIFAR10, CAPNET, [
        (str(r), dict(set=dict(iterations=r)), {"CapNet": error})
        for r, error in ((1, 14.79), (2, 14.41), (3, 14.28), (4, 14.25))]),
        Part("initial routing coefficients", CIFAR10, CAPNET, [
            (b, dict(set=dict(b_init=b)), {"CapNet": error})
            for b, error in (("random", 14.35), ("zero", 14.28), ("learnable", 14.11))]),
        Part("loss and optimizer", dict(CIFAR10, **model_row("capnet-dynamic")), OPTIMIZERS, [
            (name, dict(loss=LOSSES[name]), dict(RMSProp=rmsprop, SGD=sgd, Adam=adam))
            for name, rmsprop, sgd, adam in (
                ("spread, fix m", 15.61, 15.38, 14.97), ("spread", 15.02, 14.87, 14.50),
                ("margin", 14.30, 15.18, 14.28), ("CE loss", 14.76, "fail", 15.31))])],
}

# ---- Studies: tables of ours, run, resumed and rendered like the paper's -------------------------

# The setting of all tables on photographs.  Table 3's too: as flags, with --augment + --flip
SMALL = dict(dataset="folder", data_path="data/cifar10-jpeg", image_size=16, train_images=20000,
             epochs=5, batch_size=64, schedule="one-cycle", lr=3e-3, clip=1.0, set=dict(types=4))
ROUTING = dict(dataset="mnist", image_size=16, train_images=6000, test_images=2000, epochs=2,
               batch_size=64, schedule="one-cycle", lr=3e-3, set=dict(types=4))
LOSS_STUDY = dict(ROUTING, model="capnet-dynamic")
SGD_RATE = 1.0                                    # chosen by the second part of the study of losses

TABLES |= {
    "lambda": [study(
        "feedback weight of the default run",
        dict(dataset="digits", model="encapnet-small", hold_out=True), {"error": {}},
        {**{f"lambda {lam:g}": dict(lam=lam) for lam in (0.0, 0.1, 1.0, 10.0)},
         "lambda 10, not clipped": dict(lam=10.0, clip=0.0)})],
    "routing": [study(
        "routing iterations", ROUTING,
        {"dynamic": model_row("capnet-dynamic"), "EM": model_row("capnet-em")},
        {str(r): dict(set=dict(iterations=r)) for r in (1, 2, 3, 5)}), study(
        "the softmax over j, which did not converge in the paper; 3 iterations", ROUTING, CAPNET,
        {"over j": dict(set=dict(softmax="out"))}), study(
        "initial routing coefficients; 3 iterations", ROUTING, CAPNET,
        {"random": dict(set=dict(b_init="random")),
         "zero": dict(set=dict(iterations=3)),                           # the runs of row 3
         "learnable": dict(set=dict(b_init="learnable"))})],
    "losses": [study(
        f"loss and optimizer, CapNet (dynamic); SGD at a rate of {SGD_RATE:g}, the others at "
        f"{ROUTING['lr']:g}", LOSS_STUDY,
        {**OPTIMIZERS, "SGD": dict(optimizer="sgd", lr=SGD_RATE)},
        {name: dict(loss=loss) for name, loss in LOSSES.items()}), study(
        "SGD's rate, by the margin loss",
        dict(LOSS_STUDY, optimizer="sgd", hold_out=True, test_images=0), {"error": {}},
        {f"SGD, rate {lr:g}": dict(lr=lr) for lr in (0.3, 1.0, 3.0, 10.0)})],
    "augment": [study(
        "EncapNet with two units per module, as (8) of Table 3; a ResNet of the same width", SMALL,
        {"EncapNet": model_row("encapnet"), "ResNet": model_row("resnet18")},
        {"no augmentation": {}, "+": dict(augment="+"), "++": dict(augment="++", epochs=8)},
        own_data=True)],
}
# Figures show results of rows of Tables 1 and 3
FIGURES = {
    "2": [study("agreement of votes with the class capsule, Table 1 (a) and (b)", CIFAR10, {"": {}},
              {"Dynamic": model_row("capnet-dynamic"), "EM": model_row("capnet-em")})],
    "4": [study("training loss without and with OT divergence, Table 3 (a) and (c)", CIFAR10,
              TABLES["3"][1].columns,
              {"": dict(set=dict(feedback=0)), "with OT": dict(set=dict(feedback=1))})],
}


# ---- The cells of a table ------------------------------------------------------------------------

def row_config(*layers):
    """A cell's Config.  --set reaches the networks that take it; types=T narrows the others."""
    changes = merge(*layers)
    model = encapnet.MODELS.get(changes["model"])
    mine = encapnet.keywords(model.network) if model else ()
    known = {name for other in encapnet.MODELS.values()
             for name in encapnet.keywords(other.network)}
    wanted = {k: v for k, v in changes["set"].items() if k in mine or k not in known}
    types = changes["set"].get("types")
    if isinstance(types, int) and "types" not in mine:
        wanted = {"width": types / 32, **wanted}
    own_recipe = {"recipe": "paper"} if changes.get("dataset") == "folder" else {}
    return make_config(**{**own_recipe, **changes, "set": wanted})


def asked_parts(parts, given, only=()):
    """The blocks to run or draw, of their rows those with one of the words `only` in their name.

    A word that is a row's whole name means that row alone.  With --dataset, the blocks that can
    take it: ImageNet's keep to their own.
    """
    names = [row[0] for part in parts for row in part.rows]
    wanted = {name for word in only for name in names
              if (name == word if word in names else word in name)}
    parts = [part._replace(rows=[row for row in part.rows if not only or row[0] in wanted])
             for part in parts]
    return [part for part in parts if part.rows and not (
        part.own_data and given.get("dataset", part.base["dataset"]) != part.base["dataset"])]


def part_columns(part, given):
    """The columns to run: with --dataset, that data set's, or the first on other data."""
    if "dataset" not in given or not all("dataset" in changes for changes in part.columns.values()):
        return part.columns
    same = {name: c for name, c in part.columns.items() if c["dataset"] == given["dataset"]}
    return same or dict(list(part.columns.items())[:1])


def part_cells(part, given):
    """{(row, column): Config} of every cell that the paper fills by a run."""
    return {(name, column): row_config(part.base, about, changes, given)
            for name, changes, paper in part.rows
            for column, about in part_columns(part, given).items()
            if part.study or paper.get(column) is not None}
