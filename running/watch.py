"""What a run says about itself: what it was, the line of the log, its bars, and what deserves a sentence."""

import json
import math
import platform
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from plumbing.files import ROOT, named
from plumbing.ranks import barrier, rank, say, world_size
from running import curves

STUCK = 50  # steps on end without learning, before it is said
WARM = 20  # steps after which the speed of the loader is judged


def origin(device, dtype) -> dict:
    """What results.json says of where a run comes from. Ask when it starts: files change while it trains."""
    commit, is_clean = find_commit(ROOT)
    return {
        "commit": commit,
        "is_clean": is_clean,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ranks": world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(dtype).removeprefix("torch."),
    }


def find_commit(folder) -> tuple:
    """(commit, whether all files that git knows are as they were committed); (None, None) where git says
    nothing."""
    with suppress(OSError, subprocess.SubprocessError):
        git = ["git", f"--git-dir={folder}/.git", f"--work-tree={folder}"]  # not that of a folder above
        ask = ["describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
        said = subprocess.run(git + ask, capture_output=True, text=True, check=True, timeout=60).stdout
        commit, _, dirty = said.strip().partition("-")
        return commit, not dirty
    return None, None


def figures(sums: dict, weights: dict, loss_scale: float, batch: int) -> dict:
    """The line of the log, from a step's sums over all ranks and the weights of the contrastive losses.

    generative, patch, prompt   the losses, in nats; loss: their weighted sum
    NAME_retrieval  the part of images whose most similar caption is their own
    NAME_relative   loss / ln(batch): 1 is what knowing nothing costs
    NAME_weight     what the loss is multiplied with
    NAME_grad       norm of the loss's gradient at the cut, as of weight 1
    NAME_ratio      norm of the weighted gradient over that of the captioning loss's
    NAME_cosine     between the two gradients

    None stands for what has no value: a float16 step that overflowed, a ratio to nothing.
    """
    for name in ("generative", *weights):
        if loss_scale == 1 and not math.isfinite(sums.get(name, 0.0)):
            raise ValueError(f"the {name} loss is not finite; no weight was changed")
    line = {}
    for name in ("generative", *weights):
        for key in (name, f"{name}_retrieval"):
            if key in sums:
                line[key] = sums[key]
        if f"{name}_square" in sums:
            line[f"{name}_grad"] = math.sqrt(sums[f"{name}_square"]) / loss_scale
    line["loss"] = line.get("generative", 0.0)
    for name, weight in weights.items():
        line[f"{name}_weight"] = weight
        if name in sums:
            line["loss"] += weight * sums[name]
            line[f"{name}_relative"] = ratio(sums[name], math.log(batch))
        if f"{name}_product" in sums:
            captioning = line["generative_grad"]
            own = line[f"{name}_grad"]
            product = sums[f"{name}_product"] / loss_scale**2
            line[f"{name}_ratio"] = ratio(weight * own, captioning)
            line[f"{name}_cosine"] = ratio(product, captioning * own)
    for key, value in line.items():
        if value is None or not math.isfinite(value):
            line[key] = None
    return line


def ratio(a: float, b: float) -> float | None:
    """a / b, or None."""
    return a / b if b else None


def bars(config, start: int, steps: int):
    """Yield each step from `start` on, with its progress bar. Contrast first has one of its own: its steps
    take far less time."""
    first = config.contrastive_first
    for name, begin, end in (("contrast first", 0, first), (config.stage, first, steps)):
        left = range(max(begin, start), end)
        if not left:
            continue
        with tqdm(desc=name, initial=left[0] - begin, total=end - begin, disable=rank() > 0) as bar:
            for step in left:
                yield step, bar
                bar.update()


def shown(line: dict, terms) -> dict:
    """What a progress bar has room for: each loss, its part of the gradient, and what is held out."""
    keys = ["generative", "val_generative"]
    for name in terms:
        keys += [name, f"{name}_ratio", f"val_{name}_retrieval"]
    return {key: f"{line[key]:.3g}" for key in keys if line.get(key) is not None}


def log(out, line: dict):
    """Add the line to OUT/log.jsonl."""
    file = Path(out) / "log.jsonl"
    with named(file), open(file, "a") as lines:
        lines.write(json.dumps(line) + "\n")


def draw_curves(out):
    """OUT/curves.png, by rank 0; the others wait. All else is saved by now: an error here is a line, and no
    end."""
    if rank() == 0:
        try:
            with named("no curves"):
                curves.draw([out], Path(out) / "curves.png")
        except (OSError, ValueError) as error:
            say(error)
    barrier()


@contextmanager
def naming(step: int, micro_batches):
    """A ValueError in a step names the step and its records."""
    try:
        yield
    except ValueError as error:
        names = [name for m in micro_batches for name in m["names"]]
        raise ValueError(f"step {step}: {error} (its records: {', '.join(names[:4])} ..)") from error


class Watch:
    """Looks at every line of the log, and says what deserves a sentence."""

    def __init__(self, config, terms, steps: int):
        self.config = config
        self.terms = terms
        self.warm_up = config.warmup_ratio * steps
        self.stuck_steps = 0
        self.ms = 0.0
        self.wait_ms = 0.0

    def look(self, number: int, line: dict, vocab_size: int):
        """`number` counts the lines of this process, from 0."""
        if line["step"] == self.config.contrastive_first and line["generative"] is not None:
            say(f"first step: {line['tokens']} tokens carry loss; it is {line['generative']:.2f}, "
                f"a uniform guess {math.log(vocab_size):.2f}")
        if line["tokens"] == 0:
            say(f"step {line['step']}: no token carries loss, so captioning teaches nothing in it")
        for name in self.terms:
            if line.get(name) == 0 and line["step"] == 0:
                say(f"warning: the {name} loss is 0 by construction: it needs several captions that differ")
        self.look_for_stuck(line)
        self.look_for_waiting(number, line)

    def look_for_stuck(self, line: dict):
        """A contrastive loss near ln(batch) knows nothing."""
        heard = [name for name in self.terms if line.get(f"{name}_weight")]  # 0 behind contrast first
        stuck = [name for name in heard if (line.get(f"{name}_relative") or 0) > 0.98]
        self.stuck_steps += 1
        if not stuck or line["step"] <= self.warm_up:
            self.stuck_steps = 0
        if self.stuck_steps == STUCK:
            say(f"warning: the {stuck[0]} loss has stayed above 0.98 ln(batch) for {STUCK} steps: it learns "
                "nothing. See --contrastive_balance and --contrastive_first")

    def look_for_waiting(self, number: int, line: dict):
        """Step 0 starts the loader, so it does not count. With a cache only the first pass waits."""
        if number > 0:
            self.ms += line["ms"]
            self.wait_ms += line["wait_ms"]
        if number == WARM and self.wait_ms > 0.1 * self.ms and not self.config.cache:
            samples = 1000 * WARM * self.config.batch
            say(f"warning: the loader is slower than the step: {samples / self.ms:.1f} samples/s, the step "
                f"alone {samples / (self.ms - self.wait_ms):.1f}. More --workers (up to a rank's cores), or "
                "--features")
