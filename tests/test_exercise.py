"""Each exercise is red, in words, when its body is out; all in a copy. Green with it is the suite itself."""

import os
import shutil
import subprocess
import sys

import pytest
from exercise import EXERCISES, ROOT, expected_red, with_body
from mutants import ANSWERS, MUTANTS, copy_project, first_line, grader, is_sentence, look, mutated

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git brings the bodies back")

WORDS = {  # what the tests say to the first mutant of those without a body
    "splice": "patches are not where their placeholders are",
    "contrastive_loss": "not the InfoNCE of the definition: one direction alone",
    "step": "have no total: one that nobody used is sent, too",
    "rotate": "or other pairs: dimension i goes with i + half",
    "max_pooling": "not the largest number of each channel: still the",
}


def run(folder, *command) -> tuple:
    """(exit status, what is printed) of a command in the copy."""
    ended = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return ended.returncode, ended.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project, under git."""
    folder = tmp_path_factory.mktemp("exercises")
    copy_project(folder)
    who = "-c", "user.name=nobody", "-c", "user.email=nobody", "-c", "commit.gpgsign=false"
    for command in (("init", "-q"), ("add", "."), (*who, "commit", "-q", "-m", "all")):
        assert run(folder, "git", *command) == (0, "")
    return folder


@pytest.fixture(scope="module")
def grade(copy):
    with grader(copy) as grade:
        yield grade


def graders_in(printed) -> str:
    """What the exercise says grades it, behind `python -m pytest` and its options."""
    line = next(line for line in printed.splitlines() if "pytest" in line)
    return line[line.index("tests/") :]


@pytest.mark.parametrize("name", EXERCISES)
def test_an_exercise_is_red_in_words(copy, grade, name):
    """Right after it has begun, and with a mistake that people make."""
    file = copy / EXERCISES[name].file
    whole = file.read_text()
    try:
        status, printed = run(copy, sys.executable, "tests/exercise.py", name)
        assert status == 0 and EXERCISES[name].idea in printed and expected_red(name) in printed
        status, said = grade(graders_in(printed))
        assert status == 1 and expected_red(name) in first_line(said), said
        if name in WORDS:
            _, *change = MUTANTS[name][0]
            file.write_text(mutated(whole, name, change))
            status, said = grade(graders_in(printed))
            assert status == 1 and WORDS[name] in first_line(said), said
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


def test_max_pooling_is_green_where_it_is_written(copy, grade):
    exercise = EXERCISES["max_pooling"]
    file = copy / exercise.file
    whole = file.read_text()
    file.write_text(with_body(whole, exercise.function, ANSWERS["max_pooling"]))
    status, said = grade(exercise.tests)
    file.write_text(whole)
    assert status == 0, said


@pytest.mark.mutants
@pytest.mark.parametrize("name", EXERCISES)
def test_every_mutant_is_red_in_a_sentence(copy, grade, name):
    """At least eight of each exercise; `python tests/mutants.py` prints the table."""
    found = list(look(name, copy, grade))
    assert len(found) >= 8
    assert [(wrong, said) for wrong, is_red, said in found if not (is_red and is_sentence(said))] == []


WAITING = sys.executable, "-c", "input()"  # with a run's words behind it, it looks like one


@pytest.mark.skipif(not os.path.isdir("/proc/self/cwd"), reason="seen in /proc alone")
@pytest.mark.parametrize("words, is_seen", [
    ([*WAITING, "train.py", "--stage", "align"], True), ([*WAITING, "{}/eval.py"], True),
    ([*WAITING, "-m", "pytest"], True), ([*WAITING, "../train.py"], False),
    ([*WAITING, "lab/train.py"], False), (["tail", "-f", "train.py"], False)])
def test_nothing_is_taken_out_while_a_run_uses_the_files(copy, words, is_seen):
    """A run of another folder is none, nor is another program that has the file open."""
    with subprocess.Popen([word.format(copy) for word in words], cwd=copy, stdin=subprocess.PIPE,
                          stdout=subprocess.DEVNULL) as process:
        status, said = run(copy, sys.executable, "tests/exercise.py", "rotate")
        process.kill()
    refused = f"exercise.py: process {process.pid} runs these files; wait until it is done\n"
    assert (status, said) == (1, refused) if is_seen else status == 0
    assert run(copy, "git", "checkout", "-q", "llm.py") == (0, "")


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
