"""The code of the README's walk-through, stop by stop: of all files the lines that carry the ideas.

    python tests/tour.py      # an hour's reading
    python tests/tour.py 4    # stop 4: the losses

Nothing is copied here: functions are named, and printed from the files with their line numbers.
"""

import ast
import pydoc
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

STOPS = {  # {number: (its title, {file: functions, or methods, or whole classes})}
    1: ("A picture becomes features", {
        "vit.py": ["Family", "FAMILIES", "Embeddings", "Attention", "Block", "ViT.__init__", "ViT.forward"]}),
    2: ("Ids become logits, but so do vectors", {
        "llm.py": ["RMSNorm", "rope_tables", "rotate", "Attention", "Block", "visible_positions",
                   "LLM.hidden", "LLM.generate"]}),
    3: ("Features enter the sentence", {
        "projector.py": ["VLM.encode", "VLM.image_places", "VLM.splice"]}),
    4: ("Three losses", {
        "losses.py": ["generative_loss", "find_places", "hidden_at", "last_before_labels", "caption_pass",
                      "pool_patches", "pool_caption", "patch_vectors", "prompt_vectors", "contrastive_loss",
                      "GatherWithGradient", "ContrastiveTerm"]}),
    5: ("A record becomes labels", {
        "data.py": ["clean_turns", "plain", "v1", "tokenise", "tokenise_text", "token_roles", "expand",
                    "collate"]}),
    6: ("One step", {
        "losses.py": ["contrast", "products", "weighted_sum", "figures"],
        "llm.py": ["checkpointed", "saved_tensors"],
        "train.py": ["Bucket", *(f"DataParallelAdamW.{name}" for name in (
            "__init__", "collect", "last_backward", "send", "receive", "step", "update", "write_weights")),
                     "learning_rate", "train_step"]}),
    7: ("Questions", {
        "eval.py": ["to_sample", "ask", "in_batches"]}),
}


def find(tree, name: str):
    """The node of a function, Class.method, class or constant."""
    for part in name.split("."):
        for node in tree.body:
            constant = getattr(node.targets[0], "id", "") if isinstance(node, ast.Assign) else ""
            if part in (getattr(node, "name", ""), constant):
                tree = node
                break
        else:
            raise KeyError(name)
    return tree


def passages(number: int):
    """Yield (file, name, its first line, its lines) of a stop."""
    for file, names in STOPS[number][1].items():
        source = (ROOT / file).read_text()
        tree, lines = ast.parse(source), source.splitlines()
        for name in names:
            node = find(tree, name)
            decorators = getattr(node, "decorator_list", [])
            first = min(part.lineno for part in [node, *decorators])
            yield file, name, first, lines[first - 1 : node.end_lineno]


def length(numbers=STOPS) -> int:
    return sum(len(lines) for number in numbers for *_, lines in passages(number))


def text_of(number: int) -> str:
    """A stop as it is printed."""
    parts = [f"{number}. {STOPS[number][0]} ({length([number])} lines)"]
    for file, name, first, lines in passages(number):
        numbered = [f"{place:5}  {line}".rstrip() for place, line in enumerate(lines, start=first)]
        parts.append("\n".join([f"---- {file}: {name}", *numbered]))
    return "\n\n".join(parts) + "\n"


def main(chosen):
    if not set(chosen) <= set(map(str, STOPS)):
        sys.exit(f"tour.py: the stops are {', '.join(map(str, STOPS))}")
    pydoc.pager("\n".join(text_of(number) for number in map(int, chosen or STOPS)))


if __name__ == "__main__":
    main(sys.argv[1:])
