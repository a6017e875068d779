"""Is it the words? An LLM whose word table is another: the control of contrast first.

    write_other(tower, records, "permuted", seed, folder)   # a folder as of any LLM

The patch loss pulls each picture to the vectors of its caption's words. If another table in their place helps
captioning as much, any discriminative start would do, and the words explain nothing.

    own        the table as it is
    permuted   each token that occurs in captions has another one's vector: the same vectors, a wrong meaning
    random     each of them has a vector of its own length in a random direction: no meaning, not among words
"""

import torch

import data
from llm import LLM
from plumbing.files import TOKENIZER_FILES, copy_files, resolve
from plumbing.tokenizer import load_tokenizer

TABLES = ("own", "permuted", "random")


def write_other(tower, records: list, table: str, seed: int, folder) -> None:
    """Write the LLM in the folder `tower` to `folder`, with another vector for each token of the captions."""
    llm = LLM.from_pretrained(tower)
    tokens = caption_tokens(records, load_tokenizer(tower))
    embedding = llm.model.embed_tokens.weight
    embedding[tokens] = other_vectors(embedding[tokens], table, torch.Generator().manual_seed(seed))
    llm.save_pretrained(folder)
    copy_files(resolve(tower, TOKENIZER_FILES), TOKENIZER_FILES, folder)


def caption_tokens(records: list, tokenizer):
    """(n,) the distinct tokens of which captions consist, in order."""
    form = data.form_of("plain", tokenizer)
    found = set()
    for record in records:
        ids, roles = data.encode(data.image_and_caption(data.clean_turns(record)), form, tokenizer, True)
        found |= {token for token, role in zip(ids, roles) if role == data.ANSWER}
    return torch.tensor(sorted(found))


def other_vectors(vectors, table: str, generator):
    """What stands in the place of vectors (n, C)."""
    if table == "own":
        return vectors.clone()
    if table == "permuted":  # all in one circle, so that none keeps its own
        circle = torch.randperm(len(vectors), generator=generator)
        others = torch.empty_like(vectors)
        others[circle] = vectors[circle.roll(1)]
        return others
    directions = torch.randn(vectors.shape, generator=generator)
    return directions / directions.norm(dim=1, keepdim=True) * vectors.norm(dim=1, keepdim=True)
