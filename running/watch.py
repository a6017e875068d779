"""What a run says about itself while it trains: its first loss, a loss that learns nothing, a slow loader."""

import math

from plumbing.ranks import say

STUCK = 50  # steps on end without learning, before it is said
WARM = 20  # steps after which the speed of the loader is judged


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
        self.look_for_stuck(line)
        self.look_for_waiting(number, line)

    def look_for_stuck(self, line: dict):
        """A contrastive loss near ln(batch) knows nothing."""
        stuck = [name for name in self.terms if (line.get(f"{name}_relative") or 0) > 0.98]
        self.stuck_steps += 1
        if not stuck or line["step"] <= self.warm_up:
            self.stuck_steps = 0
        if self.stuck_steps == STUCK:
            say(f"warning: the {stuck[0]} loss has stayed above 0.98 ln(batch) for {STUCK} steps: it learns "
                "nothing. See its _ratio in log.jsonl, --contrastive_balance and --contrastive_first")

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
