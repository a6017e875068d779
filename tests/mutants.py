"""Wrong answers to the exercises, as people write them, and whether the graders see that they are wrong.

    python tests/mutants.py               # of all exercises; some eight minutes
    python tests/mutants.py splice send   # of these

Works in a copy of the project, in one process that stays warm. Prints a line for each: the exercise, what is
wrong in it, red or green, and the first line of what its tests say. Ends with an error if one is green, or if
what is said of one is no sentence.
"""

import io
import multiprocessing
import shlex
import shutil
import signal
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from exercise import EXERCISES, ROOT, body_of, with_body

SECONDS = 300  # for one answer; where ranks wait for each other, the tests themselves give up after 60
ANSWERS = {"max_pooling": "return unit(patches.amax(dim=1))"}  # those that the files do not have

# exercise -> [(what is wrong, the body)] or [(what is wrong, what of the right body is replaced, by what)]
MUTANTS = {
    "splice": [
        ("patch by patch, and image by image within", """
            is_image = ids == self.image_token_id
            embeds = self.llm.embed(ids.masked_fill(is_image, 0)).clone()
            embeds[is_image] = patches.transpose(0, 1).flatten(0, 1)[: is_image.sum()]
            return embeds
            """),
        ("added to the word that stands there", "index_copy_", "index_add_"),
        ("the images in reverse order", "patches.to(embeds.dtype)", "patches.to(embeds.dtype).flip(0)"),
        ("the patches of an image in reverse order",
         "patches.to(embeds.dtype)", "patches.to(embeds.dtype).flip(1)"),
        ("one image for every row", "patches.to(embeds.dtype)",
         "patches.to(embeds.dtype)[:1].expand(I, N, C)"),
        ("the places counted from each row's start", "index_copy_(0, image_at",
         "index_copy_(0, image_at % S"),
        ("one place too far", "index_copy_(0, image_at", "index_copy_(0, (image_at + 1) % (B * S)"),
        ("the placeholder looked up as it stands",
         "ids.masked_fill(ids == self.image_token_id, 0)", "ids"),
        ("the first row of the batch alone", "self.llm.embed(words)", "self.llm.embed(words[:1])"),
        ("two images without a place are taken", "(len(image_at), I) != (0, 1)", "len(image_at) > 0"),
        ("a count that is wrong is not refused",
         "len(image_at) != I * N and (len(image_at), I) != (0, 1)", "False"),
        ("a text without an image takes its patches all the same",
         "patches[: len(image_at)]", "patches"),
        ("a text skips the patches", "I, N, C = patches.shape",
         "I, N, C = patches.shape\nif not (ids == -200).any():\n    return self.llm.embed(ids)"),
        ("the patches are detached", "patches.to(embeds.dtype)", "patches.detach().to(embeds.dtype)"),
        ("the words are detached", "self.llm.embed(words).flatten(0, 1)",
         "self.llm.embed(words).detach().flatten(0, 1)"),
        ("the patches keep their own dtype", "patches.to(embeds.dtype)", "patches"),
        ("the rows stay joined", "return embeds.view(B, S, C)", "return embeds"),
        ("each row takes the image of its own number", """
            embeds = self.llm.embed(ids.clamp(min=0)).clone()
            for row, is_image in enumerate(ids == self.image_token_id):
                embeds[row, is_image] = patches[row]
            return embeds
            """),
    ],
    "contrastive_loss": [
        ("one direction, one rank", """
            scores = scale * image @ text.T
            own = torch.arange(len(image))
            return F.cross_entropy(scores, own), (scores.argmax(1) == own).float().mean()
            """),
        ("captions pick no image", "(of_images + of_texts) / (2 * ", "of_images / ("),
        ("captions pick among this rank's images", "text @ all_image.T", "text @ image.T"),
        ("both directions are one", "text_to_image = scale * text @ all_image.T",
         "text_to_image = image_to_text"),
        ("own pairs at `row` on every rank", "rank() * B + ", ""),
        ("divided by this rank's rows", "(2 * len(all_keys))", "(2 * B)"),
        ("a sum of both directions", "(2 * len(all_keys))", "len(all_keys)"),
        ("a sum of all rows", " / (2 * len(all_keys))", " / 2"),
        ("a mean on each rank", 'F.cross_entropy(image_to_text, own, reduction="sum")',
         "len(all_keys) * F.cross_entropy(image_to_text, own)"),
        ("nothing is masked", "(keys[:, None] == all_keys[None]).any(-1)",
         "torch.zeros(B, len(all_keys), dtype=torch.bool)"),
        ("the positive is masked, too", "false_negative.scatter_(1, own[:, None], False)", ""),
        ("the positive of rank 0 stays on every rank", "own[:, None], False",
         "own[:, None] - rank() * B, False"),
        ("only equal captions are masked", ".any(-1)", "[..., 0]"),
        ("rows must share all keys", ".any(-1)", ".all(-1)"),
        ("masked in one direction", "text_to_image.masked_fill(false_negative, -torch.inf)", "text_to_image"),
        ("masked with a zero", "image_to_text.masked_fill(false_negative, -torch.inf)",
         "image_to_text.masked_fill(false_negative, 0.0)"),
        ("the keys of one rank", "all_keys = gather(keys)", "all_keys = keys.repeat(len(all_text) // B, 1)"),
        ("keys in fp32, where many are equal", "keys[:, None] == all_keys[None]",
         "keys[:, None].float() == all_keys[None].float()"),
        ("the scale is left out", "scale * image @", "image @"),
        ("the scale does not learn", "scale * text @", "scale.detach() * text @"),
        ("the texts made unit vectors", "all_text = gather(text)",
         "all_text = unit(gather(text)).to(text.dtype)"),
        ("captions of other ranks get no gradient", "gather(text)", "gather(text.detach())"),
        ("the accuracy of captions", "image_to_text.argmax(1)", "text_to_image.argmax(1)"),
        ("the accuracy of this rank's rows", "correct / len(all_keys)", "correct / B"),
        ("the accuracy counts equal captions as wrong",
         "correct = (image_to_text.argmax(1) == own).sum()",
         "correct = ((scale * image @ all_text.T).argmax(1) == own).sum()"),
        ("scores in bfloat16", "scale * image @ all_text.T",
         "scale * (image.bfloat16() @ all_text.bfloat16().T)"),
        ("softmax along the other axis", "F.cross_entropy(image_to_text, own",
         "F.cross_entropy(image_to_text.T, own"),
    ],
    "gather": [
        ("a mean", "return out", "return out / world_size()"),
        ("times the ranks", "return out", "return out * world_size()"),
        ("nothing comes back", "return out", "return torch.zeros_like(out)"),
        ("the first rows of its own gradient", "reduce_scatter(out, gradient.contiguous())",
         "out.copy_(gradient[: len(out)])"),
        ("the slices of its own gradient, added up", "reduce_scatter(out, gradient.contiguous())",
         "out.copy_(gradient.unflatten(0, (world_size(), -1)).sum(0))"),
        ("the neighbour's slice", "gradient.contiguous()", "gradient.roll(len(out), 0)"),
        ("every W-th row", "gradient.contiguous()",
         "gradient.unflatten(0, (-1, world_size())).transpose(0, 1).flatten(0, 1).contiguous()"),
        ("the largest, not the sum", "gradient.contiguous()",
         "gradient.contiguous(), op=torch.distributed.ReduceOp.MAX"),
        ("against the gradient", "gradient.contiguous()", "-gradient"),
        ("the sum for all rows", "return out", "torch.distributed.all_reduce(gradient)\nreturn gradient"),
        ("added up in bfloat16", "reduce_scatter(out, gradient.contiguous())",
         "half = out.bfloat16()\nreduce_scatter(half, gradient.bfloat16())\nout.copy_(half)"),
        ("rank 0 alone has the sum", "return out",
         "B = len(out)\nreturn out if rank() == 0 else gradient[rank() * B : (rank() + 1) * B]"),
        ("the other ranks' gradient without its own", "return out",
         "B = len(out)\nreturn out - gradient[rank() * B : (rank() + 1) * B]"),
    ],
    "labels": [
        ("the role of the token before", "return roles", "return roles[:1] + roles[:-1]"),
        ("the role of its first character, and no error", """
            return [role_of[min(start, len(text) - 1)] for start, _ in tokens.offsets]
            """),
        ("the role of its last character, and no error", """
            return [role_of[max(stop - 1, 0)] for _, stop in tokens.offsets]
            """),
        ("no error at a border inside a token", "if CONTEXT in covered and len(covered) > 1:", "if False:"),
        ("an answer and its end in one token is an error",
         "if CONTEXT in covered and len(covered) > 1:", "if len(covered) > 1:"),
        ("an end and a question in one token is none", "if CONTEXT in covered and len(covered) > 1:",
         "if covered == {CONTEXT, ANSWER}:"),
        ("the end is answer", "ANSWER if ANSWER in covered else covered.pop()",
         "CONTEXT if CONTEXT in covered else ANSWER"),
        ("the end carries no loss", "ANSWER if ANSWER in covered else covered.pop()",
         "ANSWER if ANSWER in covered else CONTEXT"),
        ("over an answer and its end, the end wins", "ANSWER if ANSWER in covered else covered.pop()",
         "END if END in covered else covered.pop()"),
        ("a space that was left out is not given back", 'if name.startswith("Ġ"):', "if False:"),
        ("each Ġ takes a character more", "start = min(start, end)", "start = max(start - 1, 0)"),
        ("a token without characters is context", "{role_of[min(start, len(text) - 1)]}", "{CONTEXT}"),
        ("a token without characters goes with the one before",
         "{role_of[min(start, len(text) - 1)]}", "{role_of[max(start - 1, 0)]}"),
        ("a token without characters is left out", "covered = {role_of[min(start, len(text) - 1)]}",
         "continue"),
        ("a token without characters at the end has no next one",
         "role_of[min(start, len(text) - 1)]", "role_of[start]"),
        ("everything carries loss", "return roles", "return [ANSWER for _ in roles]"),
        ("one character too many is looked at", "role_of[start:stop]", "role_of[start : stop + 1]"),
    ],
    "recomputed": [
        ("no gradient recorded in the second run", "torch.enable_grad()", "torch.no_grad()"),
        ("the input is not detached", "ctx.saved_tensors[0].detach().requires_grad_()",
         "ctx.saved_tensors[0].requires_grad_()"),
        ("the input asks for no gradient", ".detach().requires_grad_()", ".detach()"),
        ("the second run comes twice", "y = ctx.function(x, *ctx.rest)",
         "ctx.function(x, *ctx.rest)\n    y = ctx.function(x, *ctx.rest)"),
        ("the second run comes eight times", "y = ctx.function(x, *ctx.rest)",
         "y = [ctx.function(x, *ctx.rest) for _ in range(8)][-1]"),
        ("backward goes through it twice", "torch.autograd.backward(y, gradient)",
         "torch.autograd.backward(y, gradient, retain_graph=True)\ntorch.autograd.backward(y, gradient)"),
        ("the second run is kept", "no_gradients = ", "ctx.y = y\nno_gradients = "),
        ("the function is run on the gradient", "ctx.function(x, ", "ctx.function(gradient, "),
        ("the gradient of the output is ignored", "(y, gradient)", "(y, torch.ones_like(y))"),
        ("the gradient of the output is added to that of the input", "x.grad, *", "x.grad + gradient, *"),
        ("the input gets none", "None, x.grad, *no_gradients", "None, None, *no_gradients"),
        ("one gradient too few", "None, x.grad, *no_gradients", "None, x.grad"),
        ("the gradient of the input stands first", "None, x.grad, *no_gradients",
         "x.grad, None, *no_gradients"),
        ("the other arguments are forgotten", "(x, *ctx.rest)", "(x)"),
        ("what was kept is let go after the first backward", "no_gradients = [None for _ in ctx.rest]",
         "no_gradients = [None for _ in ctx.rest]\ndel ctx.function"),
        ("backward is asked for the input's gradient alone", "torch.autograd.backward(y, gradient)",
         "torch.autograd.backward(y, gradient, inputs=[x])"),
        ("a gradient in bfloat16", "None, x.grad, *", "None, x.grad.bfloat16(), *"),
    ],
    "send": [
        ("a mean", "gradient = bucket.close()", "gradient = bucket.close() / world_size()"),
        ("the bucket is not closed", "bucket.close()", "bucket.gradient"),
        ("nobody waits", "self.messages.append((bucket, total, work, gradient))",
         "self.messages.append((bucket, total, None, gradient))"),
        ("all wait at once", "work = dist.all_reduce(gradient, async_op=True)", "dist.all_reduce(gradient)"),
        ("sharded, all wait at once", "work = reduce_scatter(total, gradient, async_op=True)",
         "reduce_scatter(total, gradient)"),
        ("it is received at once", "if self.shard and len(self.messages) > 2:", "if self.messages:"),
        ("sharded, what is on its way is let go", "(bucket, total, work, gradient)",
         "(bucket, total, work, None)"),
        ("sharded, any number is on its way", "if self.shard and len(self.messages) > 2:", "if False:"),
        ("it is summed twice", "work = dist.all_reduce(gradient, async_op=True)",
         "dist.all_reduce(gradient)\n    work = dist.all_reduce(gradient, async_op=True)"),
        ("vectors stay at home", "elif world_size() > 1:", "elif world_size() > 1 and bucket.is_matrix:"),
        ("sharded, nothing is sent", "work = reduce_scatter(total, gradient, async_op=True)",
         "total.copy_(bucket.own(gradient))"),
        ("sharded, everybody has rank 0's slice", "work = reduce_scatter(total, gradient, async_op=True)",
         "dist.all_reduce(gradient)\n    total.copy_(gradient.chunk(world_size())[0])"),
        ("sharded, the whole gradient is the total", "work = reduce_scatter(total, gradient, async_op=True)",
         "total = gradient\n    work = dist.all_reduce(gradient, async_op=True)"),
        ("rank 0's gradient for all", "dist.all_reduce(gradient, async_op=True)",
         "dist.broadcast(gradient, src=0, async_op=True)"),
        ("in bfloat16", "gradient = bucket.close()", "gradient = bucket.close().bfloat16().double()"),
        ("rank 1 sends nothing", "elif world_size() > 1:", "elif world_size() > 1 and rank() == 0:"),
        ("on one rank, too", "elif world_size() > 1:", "else:"),
        ("it has no message", "self.messages.append((bucket, total, work, gradient))",
         "bucket.total = total\nif work is not None:\n    work.wait()"),
    ],
    "step": [
        ("nothing is forgotten, and what nobody used is not sent", """
            for bucket in self.buckets:
                if bucket.gradient is not None:
                    self.send(bucket)
            while self.messages:
                self.receive()
            norm = self.gradient_norm()
            self.update(lr, norm)
            return norm
            """),
        ("a bucket that nobody used is not sent", "bucket.gradient is not None or not bucket.is_sent",
         "bucket.gradient is not None"),
        ("what has left is sent again", "if bucket.gradient is not None or not bucket.is_sent:", "if True:"),
        ("what is left over is not sent", "if bucket.gradient is not None or not bucket.is_sent:",
         "if False:"),
        ("the total is not forgotten", "bucket.total = None", "pass"),
        ("`is_sent` is not set back", "bucket.is_sent = False", "pass"),
        ("`is_last` is not set back", "self.is_last = False", "pass"),
        ("nobody waits", "while self.messages:\n    self.receive()", ""),
        ("one message is awaited", "while self.messages:", "if self.messages:"),
        ("updated before the norm is looked at", "if is_finite:\n    self.update(lr, norm)\nelif",
         "self.update(lr, norm)\nif is_finite:\n    pass\nelif"),
        ("a NaN is no error", "math.isfinite(norm)", "norm != math.inf"),
        ("nothing is an error", 'raise ValueError("the gradient is not finite; no weight was changed")',
         "pass"),
        ("float16 never gives up", "elif not self.is_half or self.loss_scale <= 1:",
         "elif not self.is_half:"),
        ("an overflow is an error in float16, too", "elif not self.is_half or self.loss_scale <= 1:",
         "else:"),
        ("the loss scale is never adjusted", "if self.is_half:", "if False:"),
        ("the loss scale is only halved", "if self.is_half:", "if self.is_half and not is_finite:"),
        ("the loss scale of fp32 grows", "if self.is_half:", "if True:"),
        ("a skipped step keeps its gradient", "if self.is_half:\n    self.adjust_loss_scale(is_finite)",
         "if self.is_half:\n    self.adjust_loss_scale(is_finite)\nif not is_finite:\n    return None"),
        ("a skipped step has a norm", "return norm if is_finite else None", "return norm"),
        ("there is no clipping", "self.update(lr, norm)", "self.update(lr, 0.0)"),
        ("each rank its own norm", "norm = self.gradient_norm()",
         "norm = sum(b.total.square().sum() for b in self.buckets).sqrt().item()"),
        ("a norm times the loss scale", "return norm if", "return norm * self.loss_scale if"),
        ("an update twice", "    self.update(lr, norm)",
         "    self.update(lr, norm)\n    self.update(lr, norm)"),
    ],
    "rotate": [
        ("neighbours are a pair", """
            half = x.shape[-1] // 2
            first, second, cos, sin = x[..., 0::2], x[..., 1::2], cos[..., half:], sin[..., half:]
            return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
            """),
        ("the next one is the partner", "x.shape[-1] // 2", "1"),
        ("a quarter of the head away", "x.shape[-1] // 2", "x.shape[-1] // 4"),
        ("the wrong way round", "sin)", "-sin)"),
        ("two minus signs", "sin)", "-sin.abs())"),
        ("two plus signs", "sin)", "sin.abs())"),
        ("sine and cosine change places", "x * cos, partner, sin", "x * sin, partner, cos"),
        ("the halves change places", "x * cos, partner, sin", "partner * cos, x, sin"),
        ("the second half stays", """
            first, second = x.chunk(2, dim=-1)
            turned = torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
            return torch.cat([turned.chunk(2, dim=-1)[0], second], dim=-1)
            """),
        ("the first half has turned before the second is computed", """
            first, second = x.chunk(2, dim=-1)
            cos, sin = cos.chunk(2, dim=-1)[1], sin.chunk(2, dim=-1)[1]
            first = first * cos - second * sin
            second = second * cos + first * sin
            return torch.cat([first, second], dim=-1)
            """),
        ("one position for all", "partner = ", "cos, sin = cos[:, -1:], sin[:, -1:]\npartner = "),
        ("one row's positions for all", "partner = ", "cos, sin = cos[:1], sin[:1]\npartner = "),
        ("one speed for all pairs", "partner, sin", "partner, sin[..., :1].abs() * sin.sign()"),
        ("heads for positions", "partner = ",
         "cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)\npartner = "),
        ("the partner in another head", "dims=-1", "dims=-2"),
        ("a new axis for the pair", "torch.addcmul(x * cos, partner, sin)",
         "torch.stack([x * cos, partner * sin], dim=-1)"),
        ("the answer is in fp32", "x * cos, partner, sin", "x.float() * cos, partner.float(), sin"),
        ("x itself is turned", "return torch.addcmul(x * cos, partner, sin)",
         "return x.mul_(cos).addcmul_(partner, sin)"),
    ],
    "balance": [
        ("the quotient of the squares", "math.sqrt(generative / own)", "generative / own"),
        ("upside down", "generative / own", "own / generative"),
        ("the ratio under the root", "self.balance * math.sqrt(generative / own)",
         "math.sqrt(self.balance * generative / own)"),
        ("a part of both together", "generative / own", "generative / (generative + own)"),
        ("a difference of norms", "math.sqrt(generative / own)", "(math.sqrt(generative) - math.sqrt(own))"),
        ("our own norm is left out", "generative / own", "generative"),
        ("the fixed weight comes on top", "self.balance * math", "self.fixed_weight * self.balance * math"),
        ("nothing measured is not thought of", "if self.balance and own:", "if self.balance:"),
        ("before anything is measured, the ratio", "return self.fixed_weight",
         "return self.balance or self.fixed_weight"),
        ("before anything is measured, nothing", "return self.fixed_weight",
         "return 0.0 if self.balance else self.fixed_weight"),
        ("without a ratio, the quotient", "if self.balance and own:\n    return self.balance *",
         "if own:\n    return (self.balance or 1.0) *"),
        ("at most 1", "self.balance * math.sqrt(generative / own)",
         "min(1.0, self.balance * math.sqrt(generative / own))"),
        ("at least the fixed weight", "self.balance * math.sqrt(generative / own)",
         "max(self.fixed_weight, self.balance * math.sqrt(generative / own))"),
        ("what was measured is forgotten", "generative, own = self.squares",
         "generative, own = self.squares\nself.squares = [0.0, 0.0]"),
        ("a ratio that is met from one side only", "if self.balance and own:",
         "if self.balance and own < generative:"),
    ],
    "max_pooling": [
        ("the mean", "return unit(patches.mean(dim=1))"),
        ("no unit vector", "return at_least_fp32(patches.amax(dim=1))"),
        ("the largest of each patch", "return unit(patches.amax(dim=2))"),
        ("the largest of the batch", "return unit(patches.amax(dim=(0, 1)))"),
        ("the largest of the batch for each image",
         "return unit(patches.amax(dim=(0, 1)).expand(len(patches), -1))"),
        ("the largest by magnitude", "return unit(patches.abs().amax(dim=1))"),
        ("the smallest", "return unit(patches.amin(dim=1))"),
        ("unit vectors first", "return unit(unit(patches).amax(dim=1))"),
        ("where it is, not what it is", "return unit(patches.argmax(dim=1))"),
        ("value and place", "return unit(patches.max(dim=1))"),
        ("a soft maximum", "return unit(patches.logsumexp(dim=1))"),
        ("the mean of the two largest", "return unit(patches.topk(2, dim=1).values.mean(1))"),
        ("the longest patch", """
            longest = patches.norm(dim=-1).argmax(1)
            return unit(patches[torch.arange(len(patches)), longest])
            """),
        ("no gradient", "return unit(patches.detach().amax(dim=1))"),
        ("in bfloat16", "return F.normalize(patches.amax(dim=1), dim=-1)"),
        ("the first image alone", "return unit(patches[0].amax(dim=0))[None]"),
    ],
}


def mutated(source: str, name: str, change) -> str:
    """The source of the exercise's file with another body, or with one thing replaced in the right one."""
    function = EXERCISES[name].function
    if len(change) == 1:
        return with_body(source, function, change[0])
    old, new = change
    body = ANSWERS.get(name) or body_of(source, function)
    assert body.count(old) == 1, f"{name}: {old!r} stands {body.count(old)} times in the right body"
    return with_body(source, function, body.replace(old, new))


# ------------------------------------------------------------------------------------------------------------
# The copy, and the process that grades there


def copy_project(folder):
    """The files that the exercises touch and their tests need."""
    for file in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("tests/*.*")):
        (folder / file.relative_to(ROOT).parent).mkdir(exist_ok=True)
        shutil.copy(file, folder / file.relative_to(ROOT))


@contextmanager
def grader(folder):
    """`grade(tests)`: (exit status, what is printed) of the graders of one exercise, in the copy. One process
    runs them all, as PyTorch and transformers take seconds to import."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda tests: pool.submit(graded, str(folder), tests).result()


def graded(folder: str, tests: str) -> tuple:
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(folder):
            del sys.modules[name]  # it has changed since
    sys.dont_write_bytecode = True  # a file may change twice within a second
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(out), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        status = pytest.main(["-x", "-q", "--tb=short", "-p", "no:cacheprovider", *shlex.split(tests)])
    signal.alarm(0)
    return int(status), out.getvalue()


def give_up(*_):
    raise TimeoutError(f"no answer within {SECONDS} s")


def first_line(said: str) -> str:
    """The first line of the first failure."""
    return next((line[1:].strip() for line in said.splitlines() if line.startswith("E  ")), "")


def is_sentence(line: str) -> bool:
    """Whether a failure says what is wrong, in words of ours."""
    words = line.removeprefix("AssertionError: ").split()
    return line.startswith("AssertionError: ") and words[0] != "assert" and len(words) > 4


def look(name: str, folder, grade):
    """(what is wrong, whether it is red, what is said) of each mutant of an exercise."""
    file = folder / EXERCISES[name].file
    whole = file.read_text()
    for wrong, *change in MUTANTS[name]:
        file.write_text(mutated(whole, name, change))
        try:
            status, said = grade(EXERCISES[name].tests)
        finally:
            file.write_text(whole)
        yield wrong, status == 1, first_line(said)


def main(names):
    unknown = set(names) - EXERCISES.keys()
    if unknown:
        sys.exit(f"mutants.py: {' '.join(unknown)} is none of {', '.join(EXERCISES)}")
    seen = missed = 0
    with tempfile.TemporaryDirectory() as folder, grader(folder) as grade:
        copy_project(Path(folder))
        for name in names or EXERCISES:
            for wrong, is_red, said in look(name, Path(folder), grade):
                print(f"{name:<18}{'red' if is_red else 'GREEN':<7}{wrong:<56}{said}", flush=True)
                seen += 1
                missed += not (is_red and is_sentence(said))
    print(f"{seen} mutants, {missed} green or without a sentence")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main(sys.argv[1:])
