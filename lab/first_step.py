"""The naive step: all that the align stage does, in one loop on one process.

    python -m lab.first_step    # a batch and its shapes, then 120 steps: half a minute

Losses, retrieval and norm of each step are those of `python train.py --stage align --preset tiny --steps 120`
on a CPU, in its log.jsonl. The loop lacks what that run also can: ranks that share a batch, a batch in parts
for the LLM's memory, weights of 16 bits, a contrastive loss that is held at a ratio or comes first.
"""

import math

import torch
from torch import nn

import data
import losses
from lab import parser_of
from plumbing.ranks import command
from projector import VLM
from running import loading, options, order
from train import learning_rate


def align(config):
    """Take all steps of the align stage, and print the losses, retrieval and gradient norm of each."""
    torch.manual_seed(config.seed)
    vlm = VLM.from_towers(config.vit, config.llm, config.projector)  # towers are frozen, the projector is new
    log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # the contrastive loss's temperature
    learning = [*vlm.projector.parameters(), log_scale]
    optimizer = torch.optim.AdamW(learning, weight_decay=config.weight_decay)
    samples = order.load_samples(config, vlm)
    total = order.count_steps(config, len(samples))
    lengths = order.token_counts(config, samples, vlm)
    dealt = [ranks[0] for ranks in order.deal(config, lengths, total, world=1)]  # numbers of the records
    loader = loading.make_loader(config, samples, vlm, dealt, torch.device("cpu"))

    for step, [batch] in enumerate(loader):
        # Pictures become vectors in the LLM's width, and take the places of their placeholders.
        patches = vlm.encode(batch["pixels"])  # (B, N, C)
        embeds = vlm.splice(batch["ids"], patches)  # (B, S, C)
        hidden = vlm.llm.hidden(embeds, at=batch["loss_at"])  # (n, C) where a caption's next token is due

        # Captioning: how well is each next token of the caption foreseen?
        generative = losses.generative_loss(hidden, batch["labels"], vlm.llm.head_weight, batch["loss_at"])
        generative = generative / len(batch["loss_at"])

        # Contrast: does the mean patch of a picture resemble the words of its own caption most?
        words = vlm.llm.embed(batch["caption_ids"])  # (B, T, C)
        image = losses.pool_patches(patches)  # (B, C)
        text = losses.pool_caption(words, batch["caption_mask"])  # (B, C)
        patch, retrieval = losses.contrastive_loss(image, text, log_scale.exp(), batch["keys"])

        optimizer.zero_grad()
        (generative + patch).backward()
        norm = nn.utils.clip_grad_norm_(learning, config.clip)
        optimizer.param_groups[0]["lr"] = learning_rate(step, total, config)
        optimizer.step()
        with torch.no_grad():
            log_scale.clamp_(0, math.log(100))
        if step == 0:
            first = samples[dealt[0][0][0]]
            print("first row:", repr(data.marked_text(first, samples.tokenizer)))  # [[ what is learned ]]
            print("pixels (B, 3, H, W) =", tuple(batch["pixels"].shape), end="; ")
            print("patches (B, N, C) =", tuple(patches.shape))
            print("sequence (B, S, C) =", tuple(embeds.shape), end="; ")
            print("caption (B, T, C) =", tuple(words.shape))
            print("step  generative   patch  retrieval    norm")
        print(f"{step:4}{generative:12.4f}{patch:8.4f}{retrieval:11.4f}{norm:8.4f}", flush=True)


def main(argv=None):
    parser_of("lab.first_step", __doc__).parse_args(argv)
    with command("lab.first_step"):
        config = options.configure("align", {"preset": "tiny", "steps": 120})
        options.ensure_data(config)
        align(config)


if __name__ == "__main__":
    main()
