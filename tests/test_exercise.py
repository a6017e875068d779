"""Each exercise is red, in words, when its body is out, and green when it is back; all in a copy."""

import io
import multiprocessing
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout

import pytest
from exercise import EXERCISES, ROOT, expected_red, with_body

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git brings the bodies back")

MISTAKES = {  # of those without a body, what people write, and what the tests say to it
    "splice": ("""
        is_image = ids == self.image_token_id
        embeds = self.llm.embed(ids.masked_fill(is_image, 0)).clone()
        embeds[is_image] = patches.transpose(0, 1).flatten(0, 1)[: is_image.sum()]
        return embeds
        """, "patches are not where their placeholders are"),
    "contrastive_loss": ("""
        scores = scale * image @ text.T
        own = torch.arange(len(image))
        return F.cross_entropy(scores, own), (scores.argmax(1) == own).float().mean()
        """, "not the InfoNCE of the definition: one direction alone"),
    "step": ("""
        for bucket in self.buckets:
            if bucket.gradient is not None:
                self.send(bucket)
        while self.messages:
            self.receive()
        norm = self.gradient_norm()
        self.update(lr, norm)
        return norm
        """, "a step kept the gradient of the one before"),
    "rotate": ("""
        first, second = x[..., 0::2], x[..., 1::2]
        return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
        """, "or other pairs: dimension i goes with i + half"),
    "max_pooling": ("return unit(patches.mean(dim=1))", "not the largest number of each channel: still the"),
}
MAX_POOLING = "return unit(patches.amax(dim=1))"  # the one answer that git does not have


def run(folder, *command) -> tuple:
    """(exit status, what is printed) of a command in the copy."""
    ended = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return ended.returncode, ended.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The files that the exercises touch and their tests need, under git."""
    folder = tmp_path_factory.mktemp("exercises")
    for file in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("tests/*.*")):
        (folder / file.relative_to(ROOT).parent).mkdir(exist_ok=True)
        shutil.copy(file, folder / file.relative_to(ROOT))
    who = "-c", "user.name=nobody", "-c", "user.email=nobody", "-c", "commit.gpgsign=false"
    for command in (("init", "-q"), ("add", "."), (*who, "commit", "-q", "-m", "all")):
        assert run(folder, "git", *command) == (0, "")
    return folder


@pytest.fixture(scope="module")
def grade(copy):
    """`grade(command)`: (exit status, what is printed) of a pytest command in the copy. One process runs them
    all, as PyTorch and transformers take seconds to import."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda command: pool.submit(graded, str(copy), command).result(timeout=100)


def graded(folder, command) -> tuple:
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(folder):
            del sys.modules[name]  # it has changed since
    sys.dont_write_bytecode = True  # a file may change twice within a second
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(out), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        status = pytest.main([*shlex.split(command)[3:], "-p", "no:cacheprovider"])
    return int(status), out.getvalue()


def command_in(printed) -> str:
    """The command that the exercise says grades it."""
    return next(line.partition(": ")[2].strip() for line in printed.splitlines() if "pytest" in line)


@pytest.mark.parametrize("name", EXERCISES)
def test_an_exercise_is_red_in_words(copy, grade, name):
    """Right after it has begun, and with a mistake that people make."""
    file = copy / EXERCISES[name].file
    whole = file.read_text()
    try:
        status, printed = run(copy, sys.executable, "tests/exercise.py", name)
        assert status == 0 and EXERCISES[name].idea in printed and expected_red(name) in printed
        status, said = grade(command_in(printed))
        assert status == 1 and f"E   {expected_red(name)}" in said, said
        if name in MISTAKES:
            body, words = MISTAKES[name]
            file.write_text(with_body(whole, EXERCISES[name].function, body))
            status, said = grade(command_in(printed))
            assert status == 1 and words in said, said
        back = printed.splitlines()[-1].partition(": ")[2].split()
        assert back[:2] == ["git", "checkout"] and run(copy, *back)[0] == 0
        assert file.read_text() == whole
    finally:
        file.write_text(whole)


def test_signature_and_docstring_stay():
    whole = ('class A:\n    def f(self,\n          x):\n        """Says\n        it."""{}\n\n'
             "    def g(self):{}\n\ny = 1\n")
    body = "\n        # why\n        return x"
    source = with_body(whole.format(body, body), "A.f", "if x:\n    return 2")
    assert source == whole.format("\n        if x:\n            return 2", body)


def test_all_are_green_with_their_bodies_back(copy, grade):
    """The tests of all exercises, file by file."""
    asked = {}
    for name, exercise in EXERCISES.items():
        assert run(copy, sys.executable, "tests/exercise.py", name)[0] == 0
        assert run(copy, "git", "checkout", "-q", exercise.file) == (0, "")
        file, option, names = shlex.split(exercise.tests)
        asked.setdefault((file, option), []).append(f"({names})")
    del asked["tests/test_losses.py", "-m"]  # max pooling's, which git does not have
    for (file, option), names in asked.items():
        status, said = grade(f"python -m pytest -x -q {file} {option} '{' or '.join(names)}'")
        assert status == 0, said


def test_max_pooling_is_green_where_it_is_written(copy, grade):
    exercise = EXERCISES["max_pooling"]
    file = copy / exercise.file
    whole = file.read_text()
    file.write_text(with_body(whole, exercise.function, MAX_POOLING))
    status, said = grade(f"python -m pytest -x -q {exercise.tests}")
    file.write_text(whole)
    assert status == 0, said


def test_changes_and_unknown_names_are_refused(copy):
    """In one line; nothing that git does not have is written over."""
    (copy / "llm.py").write_text(changed := (copy / "llm.py").read_text() + "# mine\n")
    ended = run(copy, sys.executable, "tests/exercise.py", "rotate")
    assert ended == (1, "exercise.py: llm.py has changes: commit them, or `git checkout llm.py` throws them "
                        "away\n")
    assert (copy / "llm.py").read_text() == changed and run(copy, "git", "checkout", "llm.py")[0] == 0
    status, said = run(copy, sys.executable, "tests/exercise.py", "rope")
    assert status == 1 and said.startswith("exercise.py: rope is none of splice, ") and said.count("\n") == 1
    shutil.copytree(copy, elsewhere := copy.parent / "without-git", ignore=shutil.ignore_patterns(".git"))
    status, said = run(elsewhere, sys.executable, "tests/exercise.py", "rotate")
    assert status == 1 and "is not a git repository" in said and said.count("\n") == 1


def test_all_ten_are_listed_without_a_name_and_in_the_readme(copy):
    status, said = run(copy, sys.executable, "tests/exercise.py")
    assert status == 0 and len(EXERCISES) == 10
    for name, exercise in EXERCISES.items():
        assert name in said and exercise.idea in said
        table = (ROOT / "tests/README.md").read_text()
        assert f"| `{name}` | `{exercise.file}: {exercise.function}` |" in table
