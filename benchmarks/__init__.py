"""Benchmarks by their official rules, one file each; BENCHES is their table.
"""

from functools import partial
from typing import NamedTuple

from benchmarks import gqa, mmbench, mme, mmmu, mmvet, pope, scienceqa, seed, textvqa, vqav2
from benchmarks.score import score_accuracy


class Bench(NamedTuple):
    folder: str  # its usual name, below the `benchmarks` folder of a run
    split: str  # where none is named
    load: object  # (folder, split) -> questions
    parse: object  # (answer, question) -> choice, or None
    score: object  # (questions, choices) -> {name: number}; None: a server or a judge does
    submit: object = None  # (questions, answers, file): writes what that wants
    tokens: int = 32  # most tokens of an answer


BENCHES = {
    "scienceqa": Bench("ScienceQA", "test", scienceqa.load, scienceqa.parse, scienceqa.score),
    "pope": Bench("POPE", "", pope.load, pope.parse, pope.score),
    "mme": Bench("MME_Benchmark_release_version", "", mme.load, mme.parse, mme.score),
    "seed": Bench("SEED-Bench", "image", seed.load, seed.parse, score_accuracy),
    "mmbench": Bench("MMBench", "dev", mmbench.load, mmbench.parse, mmbench.score, mmbench.submit),
    "mmbench-cn": Bench("MMBench-CN", "dev", partial(mmbench.load, chinese=True), mmbench.parse,
                        mmbench.score, mmbench.submit),
    "gqa": Bench("GQA", "testdev_balanced", gqa.load, gqa.parse, score_accuracy),
    "textvqa": Bench("TextVQA", "val", textvqa.load, textvqa.parse, textvqa.score),
    "vqav2": Bench("VQAv2", "test-dev2015", vqav2.load, vqav2.parse, None, vqav2.submit),
    "mmmu": Bench("MMMU", "validation", mmmu.load, mmmu.parse, mmmu.score, tokens=128),
    "mmvet": Bench("mm-vet", "", mmvet.load, lambda text, question: text, None, mmvet.submit, tokens=1024),
}
