"""GQA.
"""

from benchmarks.entries import find_entries
from benchmarks.questions import to_question
from data import find_image



def load(folder, split: str):
    """{split}_questions.json of GQA: question id -> question, answer, imageId; pictures in images/."""
    kinds = {"id": str, "question": str, "answer": str, "imageId": str}
    for file, row in find_entries(folder, f"**/{split}_questions.json", **kinds):
        image = find_image(folder / "images", f"{row['imageId']}.jpg")
        yield to_question(file, row["id"], row["question"], image, row["answer"],
                          (row.get("types") or {}).get("structural"))


def parse(text: str, question=None) -> str:
    """Lower case, without dots at the end; then GQA wants the very answer."""
    return text.rstrip(".").lower()
