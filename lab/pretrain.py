"""Makes the tiny towers: what CLIP and Vicuna are to the 7b preset, in some minutes on a CPU.

    python -m lab.pretrain                         # writes LLMS and VITS to lab/towers, then judges them
    python -m lab.pretrain --only tiny-llm-wide    # makes one of them; `--only judge` none

The LLM learns from text alone and never meets the ViT, so that there is something left to align. All are
fixed by criteria that look at no alignment (see `judge`), before any loss is compared on them.
"""

import itertools
import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import eval as evaluation
import losses
from benchmarks import pope, scienceqa
from benchmarks.questions import LETTERS
from benchmarks.score import percent
from lab import parser_of, toy_world
from llm import LLM, LLMConfig
from projector import VLM
from running.options import Config
from train import DataParallelAdamW, learning_rate
from plumbing.tokenizer import load_tokenizer
from vit import ViT, ViTConfig

TINY_VIT = ViTConfig(image_size=toy_world.IMAGE_SIZE, patch_size=8, hidden_size=96, intermediate_size=384,
                     num_hidden_layers=4, num_attention_heads=2)
TINY_LLM = LLMConfig(vocab_size=toy_world.VOCABULARY, hidden_size=128, intermediate_size=256,
                     num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, head_dim=64,
                     max_position_embeddings=1024)
WIDE_LLM = replace(TINY_LLM, hidden_size=192, intermediate_size=384, num_attention_heads=3,
                   num_key_value_heads=3)
LLMS = {"tiny-llm": TINY_LLM, "tiny-llm-wide": WIDE_LLM}  # the preset's; for the ablation of its size
VITS = ("tiny-vit", "tiny-vit-no-text")

# ---- The vision towers -------------------------------------------------------------------------------------


def pixels_of(scenes, rng: random.Random) -> torch.Tensor:
    """A fresh picture of each scene, (B, 3, 48, 48)."""
    pictures = [toy_world.picture(scene, rng) for scene in scenes]
    return torch.stack([data.preprocess(picture, TINY_VIT, "crop") for picture in pictures])


def pretrain_vit(folder: Path, seed: int, sees_text: bool = True, steps: int = 1000, batch: int = 96) -> None:
    """Train a small CLIP: the picture (mean of the last block's patches) against its caption (mean word
    vector). Without text, against another picture of the same scene, as self-supervised encoders are.

    The words are those of the tokenizer in the folder tiny-llm beside this one.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    scenes = toy_world.scenes()["train"]
    tokenizer = load_tokenizer(folder.parent / "tiny-llm")
    vit = ViT(TINY_VIT, feature_layer=-1)
    word_vectors = nn.EmbeddingBag(len(tokenizer), 96)
    to_image = nn.Linear(96, 96)
    term = losses.ContrastiveTerm()
    parts = nn.ModuleList([vit, to_image, term])
    if sees_text:
        parts.append(word_vectors)

    def image_vectors(chosen):
        patches = vit(pixels_of(chosen, rng))  # (B, N, D)
        return losses.unit(to_image(patches.mean(1)))  # (B, D)

    optimizer = DataParallelAdamW(parts.parameters(), clip=1.0)
    config = Config(lr=2e-3, warmup_ratio=0.1)
    bar = tqdm(range(steps), desc=f"pretrain {folder.name}")
    for step in bar:
        chosen = [rng.choice(scenes) for _ in range(batch)]
        numbers = [scenes.index(scene) for scene in chosen]
        keys = torch.tensor(numbers)[:, None]  # (B, 1): a scene is not its own negative
        image = image_vectors(chosen)
        other = caption_means(chosen, tokenizer, word_vectors) if sees_text else image_vectors(chosen)
        loss, _ = losses.contrastive_loss(image, other, term.scale(), keys)
        loss.backward()
        optimizer.step(learning_rate(step, steps, config))
        term.clamp_()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    vit.half().save_pretrained(folder)


def caption_means(scenes, tokenizer, word_vectors) -> torch.Tensor:
    """The mean word vector of each scene's caption, of length 1, (B, D)."""
    captions = [toy_world.CAPTION.format(**scene) for scene in scenes]
    rows = tokenizer(captions, add_special_tokens=False).input_ids
    ends = torch.tensor([len(row) for row in rows]).cumsum(0)
    starts = F.pad(ends[:-1], (1, 0))  # of each caption among all words
    words = torch.tensor(sum(rows, []))
    return losses.unit(word_vectors(words, starts))


# ---- The language towers -----------------------------------------------------------------------------------


def pretrain_llm(folder: Path, seed: int, most: int = 600, steps=(150, 500, 600), batch: int = 64) -> None:
    """Train a language model on the toy world's text: a game with words, then three lessons of `steps`.

    The game has the hard skill in its purest form: find a word and say what stood before it, as the letter of
    an answer does. It is played until it is won, in at most `most` steps. Without it, the many easy tokens of
    questions drown the few hard ones. Yes or no takes a lesson of its own; noise comes last.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    scenes = toy_world.scenes()["train"]
    toy_world.write_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    llm = LLM(LLMS[folder.name])
    init_wide(llm)
    optimizer = DataParallelAdamW(llm.parameters(), clip=1.0, betas=(0.9, 0.98))
    teach = partial(run_lesson, llm, optimizer, tokenizer.pad_token_id)

    rows = batches(lambda number: find_game(tokenizer, number, rng), 2 * batch, 1, rng)
    title = f"pretrain {folder.name}, game"
    teach(title, rows, most, lambda step: 3e-3 * min(1, (step + 1) / 25), won_at=0.2)
    lessons = ((choice_lesson, 3e-3, 0.0), (yes_no_lesson, 2e-3, 0.0), (all_lesson, 3e-3, 0.5))
    for many, (lesson, lr, noise) in zip(steps, lessons, strict=True):
        rows = batches(lambda number: text_sample(tokenizer, lesson, scenes, number, rng), batch, 16, rng)
        config = Config(lr=lr, warmup_ratio=0.1)
        title = f"pretrain {folder.name}, {lesson.__name__}"
        teach(title, rows, many, lambda step: learning_rate(step, many, config), noise)
    llm.half().save_pretrained(folder)


def run_lesson(llm, optimizer, pad_id: int, title: str, rows, steps: int, rate_at, noise: float = 0.0,
               won_at: float = 0.0) -> None:
    """Train for `steps` at the rates `rate_at(step)`, or until the running loss is below `won_at`.

    Noise on the embeddings, of up to this standard deviation (NEFTune, Jain et al. 2023, arXiv 2310.05914),
    prepares the model for inputs that are not quite words, such as patches.
    """
    mean = 9.0
    bar = tqdm(range(steps), desc=title)
    for step in bar:
        loss = text_loss(llm, next(rows), pad_id, noise)
        loss.backward()
        optimizer.step(rate_at(step))
        mean = 0.8 * mean + 0.2 * loss.item()
        bar.set_postfix(loss=f"{mean:.3f}")
        if mean < won_at:
            break


def text_loss(llm, samples, pad_id: int, noise: float):
    """The mean next-token loss, with noise of up to this standard deviation on the embeddings of each row."""
    m = data.collate(samples, 0, data.IMAGE_MARKER, pad_id, TINY_VIT.image_size)
    embeds = llm.embed(m["ids"])  # (B, S, C)
    deviation = noise * torch.rand(len(embeds), 1, 1)
    embeds = embeds + deviation * torch.randn_like(embeds)
    hidden = llm.hidden(embeds, at=m["loss_at"])  # (n, C)
    loss = losses.generative_loss(hidden, m["labels"], llm.head_weight, m["loss_at"])
    return loss / len(m["loss_at"])


def init_wide(llm) -> None:
    """A start from which attention learns to look back; PyTorch's own, smaller one does not."""
    for name, parameter in llm.named_parameters():
        if "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.5)
        elif "proj" in name:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)


def batches(sample, batch: int, pool: int, rng: random.Random):
    """Yield lists of `batch` samples without end, none twice; `sample(number)` makes one.

    `pool` batches are made at a time and share out their samples by length, because otherwise half of a batch
    is padding.
    """
    for start in itertools.count(0, pool * batch):
        numbers = range(start, start + pool * batch)
        made = [sample(number) for number in numbers]
        made.sort(key=lambda row: len(row["ids"]))
        for first in rng.sample(range(0, len(made), batch), pool):
            yield made[first : first + batch]


def find_game(tokenizer, number: int, rng: random.Random) -> dict:
    """A sample for data.collate: eight words and their repetition backwards; or four pairs of words, and each
    pair turned round. In every other sample of pairs, the words that precede the letter in real answers stand
    between the two, so that the word must be remembered."""
    words = rng.sample(range(3, toy_world.VOCABULARY), 8)  # any tokens but the special ones
    ids = [tokenizer.bos_token_id, *words]
    roles = [data.CONTEXT] * 9
    if number % 2:
        ids += words[::-1]
        roles += [data.CONTEXT] + [data.ANSWER] * 7
    else:
        between = [tokenizer.convert_tokens_to_ids(". The answer is")] if number % 4 else []
        pairs = list(zip(words[::2], words[1::2]))
        for first, second in rng.sample(pairs, 4):
            ids += [second, *between, first]
            roles += [data.CONTEXT] * (1 + len(between)) + [data.ANSWER]
    return {"ids": ids, "roles": roles, "pixels": None, "name": f"find {number}"}


# Each lesson takes (scene, number, rng) and gives a record of LLaVA's JSON, or a caption.


def choice_lesson(scene: dict, number: int, rng: random.Random) -> dict:
    return toy_world.text_record(scene, rng, ("choice", "hint"), 1)


def yes_no_lesson(scene: dict, number: int, rng: random.Random) -> dict:
    """Yes or no, and a quarter of something else, so that the letters are not forgotten."""
    if number % 4:
        return yes_no_record(scene, rng)
    return toy_world.text_record(scene, rng, ("choice", "hint", "yes-no"), 1)


def all_lesson(scene: dict, number: int, rng: random.Random) -> dict:
    """All forms in conversations, yes or no in every other one, and one time in five a caption."""
    if number % 5 == 4:
        return {"caption": toy_world.CAPTION.format(**scene), "of": toy_world.words(scene, rng)}
    if number % 2:
        return yes_no_record(scene, rng)
    forms = ("yes-no", "choice", "hint") * 2 + ("open", "describe")
    return toy_world.text_record(scene, rng, forms, len(toy_world.QUESTIONS))


def yes_no_record(scene: dict, rng: random.Random) -> dict:
    """A yes-or-no question about every attribute: four hard tokens about one scene, where a conversation of
    toy_world.text_record has one or two. None comes up twice, so only the scene tells the answer."""
    turns = []
    for kind in rng.sample(list(toy_world.QUESTIONS), len(toy_world.QUESTIONS)):
        seen = "" if turns else toy_world.words(scene, rng) + "\n"
        question, answer = toy_world.yes_no(scene, kind, rng.random() < 0.5, rng)
        turns += toy_world.turn_pair(seen + question, answer)
    return {"conversations": turns}


def text_sample(tokenizer, lesson, scenes, number: int, rng: random.Random) -> dict:
    """A sample for data.collate of the record `lesson(scene, number, rng)`: a conversation or a caption."""
    record = lesson(rng.choice(scenes), number, rng)
    if "caption" in record:  # what stage 1 looks like: a scene, then its caption
        pieces = [(record["of"], data.CONTEXT), (" " + record["caption"], data.ANSWER), ("\n", data.END)]
        ids, roles = data.tokenise(pieces, tokenizer, has_image=False)
    else:
        form = data.form_of("v1", tokenizer)
        ids, roles = data.encode(data.clean_turns(record), form, tokenizer, has_image=False)
    return {"ids": ids, "roles": roles, "pixels": None, "name": f"text {number}"}


# ---- How good they are, by criteria that look at no alignment ----------------------------------------------


def judge(folder: Path) -> dict:
    """In percent: each LLM on questions about scenes of the validation split *told in words*, and a linear
    probe of each ViT's patch features on pictures of these scenes."""
    scores = {}
    for name in LLMS:
        vlm = VLM.from_towers(folder / "tiny-vit", folder / name, "linear")
        vlm.eval()
        tokenizer = load_tokenizer(folder / name)
        for form in PARSERS:
            scores[f"{name} {form}"] = text_accuracy(vlm, tokenizer, form)
    for name in VITS:
        scores[f"{name} probe"] = linear_probe(ViT.from_pretrained(folder / name), random.Random(1))
    return scores


PARSERS = {"choice": scienceqa.parse, "yes_no": pope.parse}  # (text, question) -> answer


def text_accuracy(vlm, tokenizer, form: str, count: int = 400) -> float:
    """Percent of questions without a picture answered rightly; `form` is "choice" or "yes_no"."""
    questions = text_questions(form, random.Random(1), count)
    answers = evaluation.ask(vlm, tokenizer, questions, "v1")
    parse = PARSERS[form]
    right = [parse(text, question) == question["answer"] for text, question in zip(answers, questions)]
    return percent(right)


def text_questions(form: str, rng: random.Random, count: int) -> list:
    """Questions as `evaluation.ask` takes them: a scene in words, then multiple choice or yes-no."""
    scenes = toy_world.scenes()["val"]
    questions = []
    for number in range(count):
        scene = rng.choice(scenes)
        kind = rng.choice(list(toy_world.QUESTIONS))
        question = {"id": number, "image": None}
        if form == "choice":
            hint = rng.choice(toy_world.HINTS)
            problem = toy_world.problem(scene, kind, rng, hint, None)
            asked = scienceqa.to_prompt(problem)
            question["options"] = list(LETTERS[: len(problem["choices"])])
            question["answer"] = LETTERS[problem["answer"]]
        else:
            is_true = rng.random() < 0.5
            asked, answer = toy_world.yes_no(scene, kind, is_true, rng)
            question["answer"] = answer.lower()
        question["prompt"] = f"{toy_world.words(scene, rng)}\n{asked}"
        questions.append(question)
    return questions


@torch.no_grad()
def linear_probe(vit, rng: random.Random) -> float:
    """Percent of the four attributes that a ridge regression on the mean patch reads from pictures of unseen
    scenes."""
    splits = toy_world.scenes()
    x, known = features(vit, splits["train"], 1500, rng)
    x_val, asked = features(vit, splits["val"], 400, rng)
    gram = x.T @ x + 0.1 * torch.eye(x.shape[1])
    right = []
    for kind, values in toy_world.VALUES.items():
        numbers = [values.index(scene[kind]) for scene in known]
        target = F.one_hot(torch.tensor(numbers), len(values)).float()
        weights = torch.linalg.solve(gram, x.T @ target)
        guesses = (x_val @ weights).argmax(1).tolist()
        right += [values[guess] == scene[kind] for guess, scene in zip(guesses, asked)]
    return percent(right)


def features(vit, scenes, count: int, rng: random.Random) -> tuple:
    """(mean patch of `count` pictures and a 1 for the bias, (count, D + 1); the scenes shown)."""
    chosen = [rng.choice(scenes) for _ in range(count)]
    pooled = vit(pixels_of(chosen, rng)).mean(1)  # (count, D)
    return F.pad(pooled, (0, 1), value=1.0), chosen


def main():
    parser = parser_of("lab.pretrain", __doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "towers",
                        help="folder of the towers")
    parser.add_argument("--only", choices=[*LLMS, *VITS, "judge"], help="make one tower, or just judge all")
    parser.add_argument("--seed", type=int, default=2)
    args = parser.parse_args()
    for name in LLMS:
        if args.only in (None, name):
            pretrain_llm(args.out / name, args.seed)
    for name in VITS:
        if args.only in (None, name):
            pretrain_vit(args.out / name, args.seed, sees_text=name == "tiny-vit")
    if args.only in (None, "judge"):
        print(json.dumps(judge(args.out)))


if __name__ == "__main__":
    main()
