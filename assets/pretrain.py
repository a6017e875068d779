"""Makes the tiny towers of this folder: what CLIP and Vicuna are to the 7b preset, in some minutes on a CPU.

    python assets/pretrain.py                       # writes LLMS and VITS below assets/, then judges them
    python assets/pretrain.py --only tiny-llm-wide  # makes one of them; `--only judge` none

They are fixed by criteria that look at no alignment (see `judge`), before any loss is compared on them.
"""

import argparse
import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import eval as evaluation
import losses
from llm import LLM
from projector import VLM
from train import TINY_LLM, TINY_VIT, Config, DataParallelAdamW, learning_rate
from vit import ViT

LLMS = {"tiny-llm": TINY_LLM,  # that of the preset; the other is for the ablation of its size
        "tiny-llm-wide": replace(TINY_LLM, hidden_size=192, intermediate_size=384, num_attention_heads=3,
                                 num_key_value_heads=3)}
VITS = ("tiny-vit", "tiny-vit-no-text")


def toy_pixels(scenes, rng) -> torch.Tensor:
    """A fresh picture of each scene, (B, 3, 48, 48)."""
    return torch.stack([data.preprocess(data.toy_picture(scene, rng), data.TOY_IMAGE_SIZE, "crop") for scene in scenes])


def pretrain_vit(folder, seed: int, sees_text: bool = True, steps: int = 1000, batch: int = 96) -> None:
    """A small CLIP: the picture (mean of the last block's patches) against its caption (mean of word vectors). Without
    text, against another picture of the same scene instead, as self-supervised encoders are trained."""
    torch.manual_seed(seed)
    rng, scenes = random.Random(seed), data.toy_scenes()["train"]
    tokenizer = data.load_tokenizer(Path(folder).parent / "tiny-llm")
    vit = ViT(TINY_VIT, feature_layer=-1)
    words, to_image, scale = nn.EmbeddingBag(len(tokenizer), 96), nn.Linear(96, 96), losses.ContrastiveScale()
    parts = [vit, to_image, scale, *([words] if sees_text else [])]
    optimizer = DataParallelAdamW([parameter for part in parts for parameter in part.parameters()], clip=1.0)
    config = Config(lr=2e-3, warmup_ratio=0.1)
    for step in (bar := tqdm(range(steps), desc=f"pretrain {folder.name}")):
        chosen = [rng.choice(scenes) for _ in range(batch)]
        keys = torch.tensor([scenes.index(scene) for scene in chosen])
        image = losses.unit(to_image(vit(toy_pixels(chosen, rng)).mean(1)))  # (B, D)
        if sees_text:
            ids = [torch.tensor(tokenizer(data.CAPTION.format(**scene), add_special_tokens=False).input_ids)
                   for scene in chosen]
            offsets = torch.tensor([0] + [len(i) for i in ids[:-1]]).cumsum(0)
            other = losses.unit(words(torch.cat(ids), offsets))  # (B, D)
        else:
            other = losses.unit(to_image(vit(toy_pixels(chosen, rng)).mean(1)))  # (B, D)
        loss, accuracy = losses.contrastive_loss(image, other, scale(), keys)
        loss.backward()
        optimizer.step(learning_rate(step, steps, config))
        scale.clamp_()
        bar.set_postfix(loss=f"{loss.item():.3f}", retrieval=f"{accuracy.item():.3f}")
    vit.half().save_pretrained(folder)


def pretrain_llm(folder, seed: int, lessons=((600, 96, 0.0), (1200, 64, 0.5))) -> None:
    """A language model of the toy world's text, in two lessons of (steps, batch, noise).

    First multiple choice in one round and nothing else, then everything: conversations and captions. Together from
    the start, the many easy tokens drown the one hard skill, finding the letter of one's answer: it was right in
    60 % of the cases after as many steps. The noise, of up to this standard deviation on the embeddings (NEFTune,
    Jain et al. 2023, arXiv 2310.05914), makes the model bear inputs that are not quite words, such as patches.
    """
    torch.manual_seed(seed)
    rng, scenes = random.Random(seed), data.toy_scenes()["train"]
    data.write_toy_tokenizer(folder)
    tokenizer = data.load_tokenizer(folder)
    llm = LLM(LLMS[folder.name])
    for name, parameter in llm.named_parameters():  # PyTorch's own, smaller, start does not learn to look back
        if "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.5)
        elif "proj" in name:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def sample(number, is_first):
        scene = rng.choice(scenes)
        if number % 5 == 4 and not is_first:  # what stage 1 looks like: a scene, then its caption
            pieces = [(data.toy_words(scene, rng) + " ", data.CONTEXT), (data.CAPTION.format(**scene), data.ANSWER),
                      ("\n", data.END)]
        else:
            record = (data.toy_text_record(scene, rng, ("choice",), 1) if is_first
                      else data.toy_text_record(scene, rng))
            pieces = data.v1(data.clean_turns(record), tokenizer.eos_token)
        ids, roles = data.tokenise(pieces, tokenizer, has_image=False)
        return {"ids": ids, "roles": roles, "pixels": None, "name": f"text {number}"}

    optimizer = DataParallelAdamW(llm.parameters(), clip=1.0, betas=(0.9, 0.98))
    config = Config(lr=3e-3, warmup_ratio=0.1)
    for lesson, (steps, batch, noise) in enumerate(lessons):
        samples = [sample(number, lesson == 0) for number in range(min(8000, steps * batch))]
        order = [i for epoch in range(math.ceil(steps * batch / len(samples)))
                 for i in data.epoch_order(len(samples), seed, epoch)]
        for step in (bar := tqdm(range(steps), desc=f"pretrain {folder.name} {lesson + 1}/2")):
            m = data.collate([samples[i] for i in order[step * batch :][:batch]], 0, data.IMAGE_MARKER,
                             tokenizer.pad_token_id, data.TOY_IMAGE_SIZE)
            embeds = llm.embed(m["ids"])  # (B, S, C)
            embeds = embeds + noise * torch.rand(len(embeds), 1, 1) * torch.randn_like(embeds)
            loss = losses.generative_loss(llm.hidden(embeds), m["labels"], llm.head_weight)
            loss = loss / losses.count_supervised(m["labels"])
            loss.backward()
            optimizer.step(learning_rate(step, steps, config))
            bar.set_postfix(loss=f"{loss.item():.3f}")
    llm.half().save_pretrained(folder)


def judge(folder) -> dict:
    """How good the towers are, in percent, by criteria that look at no alignment: questions about scenes of the
    validation split *told in words*, and linear probes of the patch features on its pictures."""
    scores = {}
    for name in LLMS:
        vlm = VLM.from_towers(folder / "tiny-vit", folder / name, "linear").eval()
        for form, right in (("choice", lambda text, q: evaluation.parse_choice(text, q["num_choices"]) == q["answer"]),
                            ("yes_no", lambda text, q: evaluation.parse_pope(text) == q["answer"].lower())):
            questions = text_questions(form, random.Random(1))
            answers = evaluation.ask(vlm, data.load_tokenizer(folder / name), questions, "v1")
            scores[f"{name} {form}"] = evaluation.percent([right(a, q) for a, q in zip(answers, questions)])
    return scores | {f"{name} probe": linear_probe(ViT.from_pretrained(folder / name), random.Random(1))
                     for name in VITS}


def text_questions(form: str, rng, count: int = 400) -> list:
    """Questions as `evaluation.ask` takes them, without a picture: a scene in words, then multiple choice or yes-no."""
    scenes, questions = data.toy_scenes()["val"], []
    for number in range(count):
        scene, kind = rng.choice(scenes), rng.choice(list(data.QUESTIONS))
        question = {"id": number, "image": None}
        if form == "choice":
            problem = data.toy_problem(scene, kind, rng, rng.choice(data.HINTS), None)
            question |= {"num_choices": len(problem["choices"]), "answer": data.LETTERS[problem["answer"]]}
            asked = data.scienceqa_prompt(problem)
        else:
            asked, question["answer"] = data.toy_yes_no(scene, kind, rng.random() < 0.5, rng)
        questions.append(question | {"prompt": f"{data.toy_words(scene, rng)}\n{asked}"})
    return questions


@torch.no_grad()
def linear_probe(vit, rng) -> float:
    """Percent of the four attributes that a ridge regression on the mean patch reads from pictures of unseen scenes."""
    scenes = data.toy_scenes()

    def features(split, count):
        chosen = [rng.choice(scenes[split]) for _ in range(count)]
        pooled = vit(toy_pixels(chosen, rng)).mean(1)  # (count, D)
        return torch.cat([pooled, torch.ones(count, 1)], dim=1), chosen

    (x, known), (x_val, asked) = features("train", 1500), features("val", 400)
    right = []
    for kind, values in data.VALUES.items():
        target = torch.tensor([[float(scene[kind] == value) for value in values] for scene in known])
        weights = torch.linalg.solve(x.T @ x + 0.1 * torch.eye(x.shape[1]), x.T @ target)  # ridge regression
        guess = (x_val @ weights).argmax(1).tolist()
        right += [values[g] == scene[kind] for g, scene in zip(guess, asked)]
    return evaluation.percent(right)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=Path(__file__).parent, type=Path, help="folder of the towers")
    parser.add_argument("--only", choices=[*LLMS, *VITS, "judge"], help="make one tower, or just judge those there are")
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
