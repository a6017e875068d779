"""An answer as the VQA server and TextVQA's scorer normalise it.
"""

import re


NUMBERS = dict(zip("none zero one two three four five six seven eight nine ten".split(),
                   "0 0 1 2 3 4 5 6 7 8 9 10".split()))


CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've
hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
y'all'd've you'd you'd've you'll you're you've""".split()
MISSPELT = {word[: at.start()] + word[at.end() :]: word
            for word in CONTRACTIONS for at in re.finditer("'", word)}
MISSPELT["somebody'd"] = "somebodyd"  # so the official list has it; all others lack one apostrophe


def normalise(text: str, question=None) -> str:
    """An answer as the VQA server and TextVQA's scorer normalise it: lower case, without commas, question
    marks, articles and dots that end no number; a sign is deleted in the whole text where it stands beside a
    space somewhere, else it becomes one; number words are digits; contractions have their apostrophes."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    original = text = re.sub("[\n\t]", " ", text)
    for sign in ";/[]\"{}()=+\\_-><@`!":
        text = text.replace(sign, "" if f"{sign} " in original or f" {sign}" in original else " ")
    words = [NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", text).split()]
    return " ".join(MISSPELT.get(word, word) for word in words if word not in ("a", "an", "the"))
