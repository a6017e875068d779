"""Ten exercises: a function loses its body, and tests grade what you write in its place.

    python tests/exercise.py           # lists them
    python tests/exercise.py splice    # takes one body out; says what to write and what grades it

`git checkout FILE` brings the body back. Five functions lose it altogether. The other five get one that runs
and is wrong, as people write it: the tests say what is wrong with it.
"""

import ast
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass
class Exercise:
    file: str
    function: str  # Class.method, or the name alone
    idea: str
    hint: str
    tests: str  # what pytest is asked to run
    wrong: str = ""  # the body that stands there meanwhile; empty: none
    red: str = ""  # the first words of what the tests then say


EXERCISES = {
    "splice": Exercise(
        "projector.py", "VLM.splice",
        "An image enters the sentence: its projected patches replace its N placeholders.",
        "`image_at` says where in the flattened ids they stand, `index_copy_` fills these places; the "
        "placeholder has no embedding, so look any row up where it stands.",
        "tests/test_projector.py -k 'splice or text_only'"),
    "contrastive_loss": Exercise(
        "losses.py", "contrastive_loss",
        "Symmetric InfoNCE: each image picks its caption among those of all ranks, each caption its image.",
        "Local rows meet gathered columns, own pairs stand at rank() * B + row; -inf where a key is shared, "
        "but not there; the sum of both directions is divided by twice the rows of all ranks.",
        "tests/test_losses.py -k 'triple_loop or captions or gradient_of_one[2]'"),
    "gather": Exercise(
        "losses.py", "GatherWithGradient.backward",
        "A row that was gathered enters the loss of every rank. Now each rank returns its own slice of the "
        "gradient: watch the ranks disagree with one process.",
        "The backward of an all-gather is a reduce-scatter. With a sum, or with a mean?",
        "tests/test_losses.py -k 'gradient_of_one[2]'",
        """
        B = gradient.shape[0] // world_size()
        return gradient[rank() * B : (rank() + 1) * B]  # (B, ...)
        """, "beside one process's, the ranks' gradient has"),
    "labels": Exercise(
        "data.py", "token_roles",
        "A token carries loss if its characters are the answer's. Now every token has the role of the next.",
        "`generative_loss` looks one token ahead, so nobody else does. A token over a question and an answer "
        "is an error, over an answer and its end it is not; one that covers no character goes with the next. "
        "Some tokenizers leave the leading space of a token (`Ġ`) out of its place.",
        "tests/test_data.py -k 'llava_vectors or lone_space or boundary or one_token or trimmed'",
        """
        roles = [role_of[min(start, len(text) - 1)] for start, _ in tokens.offsets]
        return roles[1:] + roles[-1:]  # a position predicts the token behind it
        """, "the labels are off, by one perhaps"),
    "recomputed": Exercise(
        "train.py", "Recomputed.backward",
        "Time for memory: a block's input is all that is kept, so backward runs the block once more. Now it "
        "forgets that the block has weights.",
        "Detach x and ask for its gradient, enable gradients, run the function, and `autograd.backward` from "
        "there: it reaches x, and the weights on the way. One gradient for each argument of forward.",
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
        "`all_reduce`, or with `shard` `reduce_scatter` into a slice, both with async_op=True: "
        "`receive` waits. What is on its way must stay alive.",
        "tests/test_train.py -k 'torch_adamw and (2-False or 2-True) or buckets_leave'",
        "self.messages.append((bucket, bucket.close(), None, None))",
        "the gradient is not that of one process with the whole batch"),
    "step": Exercise(
        "train.py", "DataParallelAdamW.step",
        "One update: send what is left, wait, look at the norm, update, forget the gradients.",
        "A bucket that nobody used is opened and sent all the same. A norm that is not finite is an error, "
        "in float16 a step that is skipped and halves the loss scale; 2000 good ones double it.",
        "tests/test_train.py -k 'torch_adamw and (1- or 2-True) or second_step or not_finite or overflows'"),
    "rotate": Exercise(
        "llm.py", "rotate",
        "RoPE: pairs of dimensions turn by angles that grow with the position, so that a query's product "
        "with a key depends on their distance alone.",
        "(a, b) becomes (a cos - b sin, b cos + a sin). The docstring says which dimensions are a pair.",
        "tests/test_llm.py -k 'rotate or hidden_states_equal'"),
    "balance": Exercise(
        "losses.py", "ContrastiveTerm.weight",
        "A loss is heard if its gradient is a share of the other one's. Now that share is its weight.",
        "The norm of weight times our gradient shall be share times the norm of the captioning one. "
        "`squares` has both, squared; `fixed_weight` without a share, or before anything was measured.",
        "tests/test_train.py -k 'share_is_met or share_or_a_measurement'",
        "return self.balance or self.fixed_weight", "the weighted gradient is not the share"),
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
    """The first words of the first failure, as long as nothing is written."""
    is_wrong = EXERCISES[name].wrong
    return f"AssertionError: {EXERCISES[name].red}" if is_wrong else f"NotImplementedError: exercise {name}"


def with_body(source: str, function: str, body: str) -> str:
    """The source of a file with another body of one function, below its signature and docstring."""
    node = ast.parse(source)
    for name in function.split("."):
        node = next(child for child in node.body if getattr(child, "name", "") == name)
    first, lines = node.body[0], source.splitlines(keepends=True)
    above = first.end_lineno if ast.get_docstring(node) else first.lineno - 1
    new = textwrap.indent(textwrap.dedent(body).strip(), " " * first.col_offset)
    return "".join([*lines[:above], new + "\n", *lines[node.end_lineno :]])


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


def begin(name: str):
    """Take the body out, and say what to do."""
    exercise = EXERCISES[name]
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
