"""How VQAv2's server and TextVQA's scorer normalise an answer before they compare it.

Rule: processPunctuation and processDigitArticle of vqaEval.py (Antol et al. 2015, arXiv 1505.00468), in the
form of TextVQA's scorer (facebookresearch/mmf, EvalAIAnswerProcessor), which LLaVA uses for both.
"""

import re

DIGITS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4",
    "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}
ARTICLES = ("a", "an", "the")
SIGNS = ";/[]\"{}()=+\\_-><@`!"
CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've
hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
y'all'd've you'd you'd've you'll you're you've""".split()


def list_misspelt() -> dict:
    """{a contraction that lacks one apostrophe: as it should be}."""
    misspelt = {}
    for word in CONTRACTIONS:
        for apostrophe in re.finditer("'", word):
            misspelt[word[: apostrophe.start()] + word[apostrophe.end() :]] = word
    misspelt["somebody'd"] = "somebodyd"  # the other way round in the official list
    return misspelt


MISSPELT = list_misspelt()


def normalise(text: str, question=None) -> str:
    """Lower case, number words as digits, contractions with their apostrophes; no commas, question marks,
    articles, or dots other than decimal points."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = re.sub("[\n\t]", " ", text)
    original = text
    for sign in SIGNS:
        # One sign beside a space decides for all of its kind in the text.
        is_beside_space = f"{sign} " in original or f" {sign}" in original
        text = text.replace(sign, "" if is_beside_space else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = []
    for word in text.split():
        word = DIGITS.get(word, word)
        if word not in ARTICLES:
            words.append(MISSPELT.get(word, word))
    return " ".join(words)
