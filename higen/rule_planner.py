"""Turns a story into a scene script by rules for English words of order, pace and stillness. No model, no network.

"a whale flaps its tail, first slowly, then fast, then it stops. Then a cat waves" has two scenes; the first one's pace
is ["slow", "fast", "still"]. The rules ignore the rest of the words' meaning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from higen.errors import RequestError, quoted
from higen.manifest import Manifest
from higen.request import MAX_PROMPT
from higen.tables import Control

__all__ = ["pace_control", "plan_by_rules"]

_SENTENCE = r"[.!?;\n]+"
_ORDER = (
    r"(?:,\s*|\band\s+|\bbut\s+)*\b(?:and then|then|after that|after this|afterwards|next|finally|at last|at the end|"
    r"in the end|later(?: on)?|at first|first(?:ly)?|second(?:ly)?|third(?:ly)?|lastly|suddenly|meanwhile)\b,?"
)
_FADE = r"\b(?:(?:slowly )?(?:fades|fading|dissolves|dissolving) (?:in)?to)\b"
_BOUNDARY = re.compile(f"(?P<sentence>{_SENTENCE})|(?P<fade>{_FADE})|(?P<order>{_ORDER})", re.IGNORECASE)

_PACES = (
    (
        r"(?:comes? to (?:a )?(?:rest|stop|halt|standstill)|stands? still|standing still|holds? still|keeps? still|"
        r"(?:is|stays?|remains?|goes|lies) still|stops?|stopped|stopping|halts?|freezes?|frozen|pauses?|motionless|"
        r"still|unmoving|without moving)",
        "still",
    ),
    (r"(?:very|extremely|really) (?:slow(?:ly)?|gentl[ey]|calm(?:ly)?)|in slow[- ]?mo(?:tion)?", "very slow"),
    (r"slow(?:ly|er)?(?: down)?|slows down|gentl[ey]|calm(?:ly)?|leisurely|lazily|unhurried(?:ly)?", "slow"),
    (r"(?:very|extremely|really) (?:fast|quick(?:ly)?|rapid(?:ly)?)|as fast as (?:it|he|she|they) can", "very fast"),
    (
        r"speeds up|fast(?:er)?|quick(?:ly|er)?|rapid(?:ly)?|hurried(?:ly)?|hastily|swift(?:ly)?|wild(?:ly)?|briskly",
        "fast",
    ),
    (r"at (?:a )?(?:normal|medium|moderate|steady) (?:pace|speed)|steadily|normally", "medium"),
)
_PACE = re.compile("|".join(rf"(?P<p{i}>\b(?:{pattern})\b)" for i, (pattern, _) in enumerate(_PACES)), re.IGNORECASE)

_NUMBERS = ("a", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_LASTING = re.compile(
    rf"\b(?:for|during) (?:about )?(?P<number>\d+(?:\.\d+)?|{'|'.join(_NUMBERS)}) seconds?\b", re.IGNORECASE
)

_EMPTY = frozenset(
    re.findall(
        r"\w+",
        """it he she they this that and but or so is are was gets get becomes become moves move moving goes going does
        do very more again now until till when as while there with also just too even much a an the in at on to of all
        everything""",
    )
)
"""Words that do not make a scene by themselves, as in "and then it moves"."""

_PRONOUN = re.compile(r"^(?:it|he|she|they)\b", re.IGNORECASE)
_DETERMINERS = frozenset((*_NUMBERS, "an", "the", "some", "many", "my", "our", "his", "her"))
_NO_SUBJECT = re.compile(
    r"^(?=\w+(?:s|ing|ed)(?:$| (?:over|to|on|in|into|out|off|away|up|down|at|around|across|through|back|a|an|the|"
    r"its|his|her|their|\w+ly)\b))",
    re.IGNORECASE,
)
"""The beginning of a part without a subject, such as "jumps over the fence". Its subject is in the scene before."""

_VERB = re.compile(r"(?:ing|s|ed)$", re.IGNORECASE)


@dataclass
class _Draft:
    text: str
    paces: list[str] = field(default_factory=list)
    seconds: float | None = None
    fade: bool = False


def pace_control(manifest: Manifest) -> Control | None:
    """The control that words of pace set: the first curve that has a range and is not a likeness; None if none."""
    curves = [control for control in manifest.controls if control.kind == "curve" and control.span is not None]
    return next((control for control in curves if control.encoding != "similarity"), None)


def plan_by_rules(story: str, manifest: Manifest) -> dict[str, Any]:
    """The data of a scene script (higen/script.py) for a story. Raises RequestError for a story without a scene."""
    if not isinstance(story, str) or not story.strip() or len(story) > MAX_PROMPT:
        raise RequestError(f"story={quoted(story)}: a text of 1 to {MAX_PROMPT} characters")
    pace = pace_control(manifest)
    drafts: list[_Draft] = []
    for begins, text in _pieces(story):
        _add(drafts, begins, text, pace is not None)
    if not drafts:
        raise RequestError(f"story={quoted(story)}: nothing to show in it but words of order and pace")
    return {"scenes": [_scene(draft, place, manifest, pace) for place, draft in enumerate(drafts)]}


def _pieces(story: str) -> list[tuple[str, str]]:
    """The parts between boundaries, each with the kind of its beginning: "sentence", "order", "fade", or "comma" for a
    part that may continue the one before.
    """
    found: list[tuple[str, str]] = []
    begins, start = "sentence", 0
    for boundary in [*_BOUNDARY.finditer(story), None]:
        part = story[start : boundary.start() if boundary else len(story)]
        for place, piece in enumerate(part.split(",")):
            if text := " ".join(piece.split()):
                found.append(("comma" if place else begins, text))
                begins = begins if place else "comma"
        if boundary is not None:
            kind = str(boundary.lastgroup)
            # "Then" at the start of a sentence, or "and then" after a fade, is one boundary with it.
            begins = kind if part.strip() or begins == "sentence" else begins
            start = boundary.end()
    return found


def _add(drafts: list[_Draft], begins: str, text: str, paced: bool) -> None:
    """Add a part of the story: as a new scene, to the text of the last scene, or as a change of its pace."""
    last = drafts[-1] if drafts else None
    lasting = _LASTING.search(text)
    seconds = None
    if lasting is not None:
        word = lasting["number"].lower()
        seconds = float(_NUMBERS.index(word) or 1) if word in _NUMBERS else float(word)
        text = f"{text[: lasting.start()]} {text[lasting.end() :]}"
    paces = [_PACES[int(str(found.lastgroup)[1:])][1] for found in _PACE.finditer(text)]
    rest = _tidy(_PACE.sub(" ", text)) if paced else _tidy(text)
    if not set(re.findall(r"[^\W\d_]+", _PACE.sub(" ", text).lower())) - _EMPTY:
        if last is None and not paces:
            return
        if last is None:
            drafts.append(_Draft("", paces, seconds))
            return
        last.text = last.text if paced or not paces else _tidy(f"{last.text}, {text}")
        last.paces += paces
        last.seconds = seconds if last.seconds is None else last.seconds
        return
    if last is not None and not last.text:  # "first slowly, a whale ..."
        last.text, last.paces, last.seconds = rest, last.paces + paces, seconds or last.seconds
    elif last is not None and begins == "comma":
        last.text, last.paces = f"{last.text}, {rest}", last.paces + paces
        last.seconds = seconds if last.seconds is None else last.seconds
    else:
        subject = _subject(last.text) if last is not None else ""
        shown = _PRONOUN.sub(lambda found: subject or found[0], rest)
        shown = _NO_SUBJECT.sub(f"{subject} ", shown) if subject else shown
        drafts.append(_Draft(shown, paces, seconds, begins == "fade"))


def _tidy(text: str) -> str:
    """A part of a sentence without conjunctions and white space at its ends."""
    text = re.sub(r"\s+([,;])", r"\1", " ".join(text.split()))
    text = re.sub(r"^(?:and|but|so|until|while|,|\s)+\b", "", text, flags=re.IGNORECASE)
    return re.sub(r"(?:\b(?:and|but|then|until|while)|[,\s])+$", "", text, flags=re.IGNORECASE).strip()


def _subject(text: str) -> str:
    """The subject of a scene: its first words, up to the first one that looks like a verb."""
    words = text.split(",")[0].split()
    least = 2 if words and words[0].lower() in _DETERMINERS else 1
    end = next((i for i, word in enumerate(words) if i >= least and _VERB.search(word)), least)
    return " ".join(words[:end])


def _scene(draft: _Draft, place: int, manifest: Manifest, pace: Control | None) -> dict[str, Any]:
    low, default, high = manifest.sizes.frames
    fps = manifest.sizes.fps
    scene: dict[str, Any] = {"prompt": draft.text}
    # Each change of pace after the second adds half a usual clip, up to the model's longest clip.
    frames = min(max(default, default * len(draft.paces) // 2, low), high)
    scene["seconds"] = frames / fps if draft.seconds is None else draft.seconds
    if pace is not None and draft.paces:
        scene[pace.name] = draft.paces[0] if len(draft.paces) == 1 else draft.paces
    if place:
        scene["transition"] = "crossfade" if draft.fade else "cut"
    return scene
