"""What every module of lab builds on: errors and their messages, files, devices, processes."""
import contextlib
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

RUNS = Path("runs")


class Problem(Exception):
    """Whatever a user can put right: one line on stderr and an exit code, no traceback."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


class Diverged(Problem):
    """Training is no longer finite."""


def reason(error):
    """The cause that an exception names, in one line; it may carry another process's traceback."""
    text = str(error).rpartition("Traceback (most recent call last):")[2].strip("\n")
    lines = [line for line in text.splitlines() if line.strip() and line[0] != " "]
    lines = lines or [text.strip() or type(error).__name__]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])[:300]


def say(*words):
    if rank() == 0:
        print(*words, flush=True)


def guarded(program, function, arguments=None):
    """function(arguments) -> exit code: 0, 2 for bad input, 1 for a failure, 128 + signal."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if hasattr(sys.stdout, "reconfigure"):                # what it cannot show, it shows as "?"
        sys.stdout.reconfigure(errors="replace")
    try:
        function(arguments)
        return 0
    except BrokenPipeError:                               # piped into head
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            error = Problem("interrupted", 130)
        elif type(error) is OSError or getattr(error, "strerror", None):    # full, read-only, gone
            named = f"{error.filename}: {error.strerror}"
            error = Problem(named if error.filename else reason(error), 1)
        elif not isinstance(error, Problem):
            error = Problem(f"unexpected {type(error).__name__}: {reason(error)} (--debug shows "
                            "where)", 1)
        if rank() == 0 or error.code == 1:
            print(f"{program}: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return error.code
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def count(n, noun):
    """1 epoch, 2 epochs, 1,000 classes."""
    plural = noun if n == 1 else noun + ("es" if noun.endswith("s") else "s")
    return f"{n:,} {plural}"


def write_file(path, content, keep=None):
    """Replace path by content or leave it as it was, come what may; the old goes to `keep`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):                # Windows has no descriptors of folders
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)                          # or a power cut may undo the renaming
            finally:
                os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):                # on a full or failing disk
            temporary.unlink(missing_ok=True)
        raise Problem(f"cannot write {path}: {error.strerror}; what was saved before is intact",
                      1) from error


# ---- Devices and processes -----------------------------------------------------------------------

def rank():
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def pick_device(name):
    try:
        name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        device = torch.device(name)
        if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Problem(f"--device {name}: {reason(error)}") from error


def join_processes(backend):
    """init_process_group, but a restart does not find the addresses of the processes before it."""
    from torch.distributed.rendezvous import rendezvous
    store, rank, world = next(rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def start(config):
    """Device and process group of a run -> device."""
    device = pick_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        tf32 = not config.deterministic
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():         # torchrun started us
        join_processes("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if config.batch_size % world():
        raise Problem(f"--batch-size {config.batch_size} does not divide among {world()} processes")
    return device
