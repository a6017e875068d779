"""Ten exercises: a function loses its body, and tests grade what you write in its place.

    python tests/exercise.py           # lists them
    python tests/exercise.py splice    # takes one body out; says what to write and what grades it

`git checkout FILE` brings the body back. Five functions lose it altogether. The other five get one that runs
and is wrong, as people write it: the tests say what is wrong with it. Nothing is taken out while a run uses
the files.
"""

import ast
import os
import subprocess
import sys
import textwrap
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Exercise:
    file: str
    function: str  # Class.method, or the name alone
    idea: str
    hint: str
    tests: str  # what pytest is asked to run
    wrong: str = ""  # the body that stands there meanwhile; empty: none
    red: str = ""  # what the tests then say


EXERCISES = {
    "splice": Exercise(
        "projector.py", "VLM.splice",
        "An image enters the sentence: its projected patches replace its N placeholders.",
        "`find_placeholders` without `image_at`. Id 0 where they stand, embed all, flatten, `index_copy_` as "
        "many patches, in that dtype. If neither I N nor, with I = 1, 0: "
        "ValueError('32 placeholders; 3 images of 16 tokens').",
        "tests/test_projector.py -k 'splice or text_only'"),
    "contrastive_loss": Exercise(
        "losses.py", "contrastive_loss",
        "Symmetric InfoNCE: each image picks its caption among those of all ranks, each caption its image.",
        "`gather` all three: local rows meet gathered columns, own pairs stand at rank() * B + row; -inf "
        "where any key is shared, but not there. Returns (sum over both ways / twice the rows of all ranks, "
        "images that find their caption / rows of all ranks).",
        "tests/test_losses.py -k 'triple_loop or captions or gradient_of_one[2]'"),
    "gather": Exercise(
        "losses.py", "GatherWithGradient.backward",
        "A row that was gathered enters the loss of every rank. Now each rank returns its own slice of the "
        "gradient, and the loss does not show it: the toy world's first step on two ranks has a patch loss "
        "of 4.24149 whatever stands here, and a patch_grad of 0.01551 if it is right, 0.0159 now, 0.01144 "
        "with a mean.",
        "`reduce_scatter(out, gradient)` fills an empty out (B, ...) with a rank's slice of the ranks' sum.",
        "tests/test_losses.py -k 'gradient_of_one[2]'",
        """
        B = gradient.shape[0] // world_size()
        return gradient[rank() * B : (rank() + 1) * B]  # (B, ...)
        """, "beside one process's, the ranks' gradient has"),
    "labels": Exercise(
        "data.py", "token_roles",
        "A token carries loss if its characters are the answer's. Now every token has the role of the next.",
        "tokens.tokens are names, tokens.offsets their (start, stop) in `role_of`. ValueError('it joins ..') "
        "if one covers CONTEXT and more; ANSWER beats END; one that covers no character goes with the next. "
        "A name with `Ġ` in front may lack its space: it begins no later than where the one before ended.",
        "tests/test_data.py -k 'llava_vectors or lone_space or boundary or one_token or roles_f or trimmed_'",
        """
        roles = [role_of[min(start, len(text) - 1)] for start, _ in tokens.offsets]
        return roles[1:] + roles[-1:]  # a position predicts the token behind it
        """, "the labels are off, by one perhaps"),
    "recomputed": Exercise(
        "train.py", "Recomputed.backward",
        "Time for memory: a block's input is all that is kept, so backward runs the block once more. Now it "
        "forgets that the block has weights.",
        "Once: detach x, ask for its gradient, enable gradients, run the function; `autograd.backward` of "
        "(y, gradient) reaches x, and the weights on the way. Return x's, and None for all other arguments.",
        "tests/test_train.py -k test_checkpoint",
        """
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x, *ctx.rest)
        of_x, = torch.autograd.grad(y, x, gradient)
        return None, of_x, *(None for _ in ctx.rest)
        """, "the weights of a checkpointed block get no gradient"),
    "send": Exercise(
        "train.py", "DataParallelAdamW.send",
        "Gradients are summed over the ranks while backward goes on. Now each rank keeps its own.",
        "`close` the bucket; `all_reduce`, or with `shard` `reduce_scatter` into one like its master, async; "
        "one rank alone has no work. `messages` gets (bucket, sum, work or None, gradient). Sharded, if more "
        "than two are there, `receive` one.",
        "tests/test_train.py -k 'torch_adamw and (2-False or 2-True) or buckets_leave or is_sent'",
        "self.messages.append((bucket, bucket.close(), None, None))",
        "the gradient is not that of one process with the whole batch"),
    "step": Exercise(
        "train.py", "DataParallelAdamW.step",
        "One update: send what is left, wait, look at the norm, update, forget the gradients.",
        "`send` what has a gradient or not `is_sent`, used or not; `receive` while there are `messages`; "
        "`gradient_norm`, `update`. Not finite: float16 with a scale above 1 returns None, all else is a "
        "ValueError. float16 ends with `adjust_loss_scale`, all with `total`, `is_sent`, `is_last` as they "
        "began.",
        "tests/test_train.py -k 'torch_adamw and (1- or 2-True) or once_a_step or second_step or not_finite "
        "or overflows'"),
    "rotate": Exercise(
        "llm.py", "rotate",
        "RoPE: pairs of dimensions turn by angles that grow with the position, so that a query's product "
        "with a key depends on their distance alone.",
        "(a, b) becomes (a cos - b sin, b cos + a sin). The docstring says which dimensions are a pair; the "
        "sines come with their signs (`rope_tables`). `x.roll` brings each its partner.",
        "tests/test_llm.py -k rotate"),
    "balance": Exercise(
        "losses.py", "ContrastiveTerm.weight",
        "A loss is heard if its gradient is held at a ratio to the other one's. Now the ratio is the weight.",
        "The norm of weight times our gradient shall be the ratio times that of captioning's. "
        "`squares` has both squared, ours last; `fixed_weight` without a ratio (`balance`), or if ours is 0.",
        "tests/test_train.py -k 'ratio_is_met or ratio_or_a_measurement'",
        "return self.balance or self.fixed_weight", "the weighted gradient is not at the ratio"),
    "max_pooling": Exercise(
        "losses.py", "pool_patches",
        "An extension: the maximum of each channel over the patches in place of the mean, so that a single "
        "patch can speak for its image. Does it help? With the mean and with the maximum: `python train.py "
        "--stage align --steps 120 --out runs/NAME`, then `python eval.py --bench scienceqa --ckpt runs/mean "
        "runs/max`; look at `patch_ratio` in their logs, too.",
        "`amax`, then a unit vector. (The triple loop of tests/test_losses.py stays red: it says mean.)",
        "tests/test_losses.py -m exercise"),
}


def expected_red(name: str) -> str:
    """What the first failure says, as long as nothing is written."""
    return EXERCISES[name].red or f"raised NotImplementedError: exercise {name}"


def cut(source: str, function: str) -> tuple:
    """(lines above, body, lines below, indentation): a file cut around a function's body, which begins below
    its docstring."""
    node = ast.parse(source)
    for name in function.split("."):
        node = next(child for child in node.body if getattr(child, "name", "") == name)
    first, lines = node.body[0], source.splitlines(keepends=True)
    above = first.end_lineno if ast.get_docstring(node) else first.lineno - 1
    return lines[:above], lines[above : node.end_lineno], lines[node.end_lineno :], first.col_offset


def body_of(source: str, function: str) -> str:
    _, body, _, _ = cut(source, function)
    return textwrap.dedent("".join(body))


def with_body(source: str, function: str, body: str) -> str:
    """The source of a file with another body of one function."""
    above, _, below, columns = cut(source, function)
    new = textwrap.indent(textwrap.dedent(body).strip(), " " * columns)
    return "".join([*above, new + "\n", *below])


def refuse_changes(file: str):
    """End the program where git could not bring back what is to be taken out."""
    try:
        found = subprocess.run(["git", "status", "--porcelain", "--", file], cwd=ROOT, capture_output=True)
    except OSError:
        sys.exit("exercise.py: there is no git here, and nothing else brings the body back")
    if found.returncode:
        sys.exit(f"exercise.py: {ROOT} is not a git repository, and nothing else brings the body back")
    if found.stdout:
        sys.exit(f"exercise.py: {file} has changes: commit them, or `git checkout {file}` throws them away")


def uses_these_files(process: Path) -> bool:
    """Whether a process of /proc is a Python with our train.py or eval.py, or with pytest in our folder."""
    program, *words = (process / "cmdline").read_text().split("\0")
    if "python" not in Path(program).name:
        return False  # an editor
    here = (process / "cwd").resolve()
    if "pytest" in map(os.path.basename, words) and ROOT in (here, *here.parents):
        return True
    return any((here / word).resolve() in (ROOT / "train.py", ROOT / "eval.py") for word in words)


def refuse_runs():
    """End the program while a run has the files: the processes that it starts next would read them.

    Only Linux has /proc. Runs on other machines that share the folder, and interpreters, are not seen.
    """
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it is gone, or another user's
            if uses_these_files(process):
                sys.exit(f"exercise.py: process {process.name} runs these files; wait until it is done")


def begin(name: str):
    """Take the body out, and say what to do."""
    exercise = EXERCISES[name]
    refuse_runs()
    refuse_changes(exercise.file)
    file = ROOT / exercise.file
    body = exercise.wrong or f'raise NotImplementedError("exercise {name}")'
    file.write_text(with_body(file.read_text(), exercise.function, body))
    print(f"Write:      {exercise.function} in {exercise.file}")
    print(f"The idea:   {exercise.idea}\nA hint:     {exercise.hint}")
    print(f"Grade it:   python -m pytest -x -q --tb=short {exercise.tests}")
    print(f"Red now:    {expected_red(name)}\nThe answer: git checkout {exercise.file}")


def main(names):
    if not names:
        for name, exercise in EXERCISES.items():
            print(f"{name:<18}{exercise.file}: {exercise.function}\n{'':<18}{exercise.idea}")
    elif len(names) > 1 or names[0] not in EXERCISES:
        sys.exit(f"exercise.py: {' '.join(names)} is none of {', '.join(EXERCISES)}")
    else:
        begin(names[0])


if __name__ == "__main__":
    main(sys.argv[1:])
