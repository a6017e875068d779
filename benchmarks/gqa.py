"""GQA (Hudson and Manning 2019, arXiv 1902.09506): questions made from scene graphs.

Rule: GQA's own eval.py wants the very answer; LLaVA makes it lower case and drops dots at its end. The
balanced test-dev split has 12,578 questions.

    SPLIT_questions.json    {id: {"question", "answer", "imageId", "types"}}
    images/                 IMAGEID.jpg
"""

from benchmarks.entries import find_entries
from benchmarks.questions import to_question
from data import find_image

KINDS = {"id": str, "question": str, "answer": str, "imageId": str}


def load(folder, split: str):
    """The questions, in categories by their structure."""
    pattern = f"**/{split}_questions.json"
    for file, row in find_entries(folder, pattern, **KINDS):
        if row.get("isBalanced") is False:  # in SPLIT_all; GQA's accuracy leaves it out
            continue
        name = f"{row['imageId']}.jpg"
        image = find_image(folder / "images", name)
        types = row.get("types") or {}
        category = types.get("structural")
        yield to_question(file, row["id"], row["question"], image, row["answer"], category)


def parse(text: str, question=None) -> str:
    """The answer in lower case, without dots at its end."""
    return text.rstrip(".").lower()
