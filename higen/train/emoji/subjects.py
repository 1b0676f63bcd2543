"""The subjects, backgrounds and speeds that the default model can draw, and their captions."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from higen.errors import SettingsError

FRAMES = 16
"""Frames in a clip."""

KEY_INDEX = 8
"""Index in a clip of the frame that shows the subject's canonical pose; the spatial stage draws this frame."""

FPS = 8.0
"""Frames per second at which a clip is played."""


@dataclass(frozen=True)
class Subject:
    """One animated emoji.

    `codepoint` is the stem of its WebP file, `name` a noun phrase without article, `caption` the noun phrase with
    its motion, `key_frame` the index of the canonical pose in the loop. Key frames were chosen by eye: the whole
    subject in a typical pose, with lively motion in the second before and after, so that a real-time clip shows it.
    """

    codepoint: str
    name: str
    caption: str
    key_frame: int


@dataclass(frozen=True)
class Background:
    """A picture behind the subject; `caption` is the phrase appended to a subject's caption."""

    name: str
    caption: str


@dataclass(frozen=True)
class Speed:
    """A playback speed: `factor` multiplies real time, `phrase` and `synonym` are its two wordings (may be empty)."""

    name: str
    phrase: str
    synonym: str
    factor: float


@dataclass(frozen=True)
class Style:
    """A way to phrase a caption: whether it names the action and the background, and which speed wording it takes."""

    name: str
    action: bool
    background: bool
    synonym: bool = False


SUBJECTS: tuple[Subject, ...] = (
    Subject("1f40b", "whale", "a whale flapping its tail", 24),
    Subject("1f427", "penguin", "a penguin waddling", 0),
    Subject("1f412", "monkey", "a monkey jumping", 21),
    Subject("2764-fe0f", "red heart", "a red heart beating", 27),
    Subject("1f98b", "butterfly", "a butterfly flapping its wings", 6),
    Subject("1f3a1", "ferris wheel", "a ferris wheel turning", 0),
    Subject("1f419", "octopus", "an octopus swimming", 0),
    Subject("1f47b", "ghost", "a ghost floating", 27),
    Subject("2b50", "yellow star", "a yellow star spinning", 21),
    Subject("1f44b", "hand", "a hand waving", 0),
    Subject("1f998", "kangaroo", "a kangaroo hopping", 0),
    Subject("1f41f", "blue fish", "a blue fish swimming", 21),
    Subject("1f40e", "horse", "a horse galloping", 0),
    Subject("1f3c3", "runner", "a runner running", 0),
    Subject("1f985", "eagle", "an eagle flying", 0),
    Subject("1f987", "bat", "a bat flapping its wings", 0),
    Subject("1f42c", "dolphin", "a dolphin leaping", 9),
    Subject("1f981", "lion", "a lion roaring", 46),
    Subject("1f43b", "bear", "a bear turning its head", 24),
    Subject("1f430", "rabbit", "a rabbit bouncing", 24),
    Subject("1f383", "pumpkin", "a pumpkin laughing", 12),
    Subject("1f680", "rocket", "a rocket flying", 6),
    Subject("1f6f8", "flying saucer", "a flying saucer hovering", 6),
    Subject("1f54a-fe0f", "dove", "a dove flying", 0),
    Subject("1f300", "blue spiral", "a blue spiral turning", 0),
    Subject("1f32a-fe0f", "tornado", "a tornado swirling", 0),
    Subject("1f47e", "purple alien", "a purple alien dancing", 10),
    Subject("1f98e", "lizard", "a lizard crawling", 0),
    Subject("1f980", "crab", "a crab raising its claws", 20),
    Subject("1f99c", "parrot", "a parrot bobbing", 12),
    Subject("1f99a", "peacock", "a peacock spreading its tail", 18),
    Subject("1f44d", "thumb", "a thumb going up", 21),
    Subject("1f440", "pair of eyes", "a pair of eyes looking around", 8),
    Subject("1f6a9", "red flag", "a red flag waving", 36),
    Subject("1f6b4", "cyclist", "a cyclist riding", 0),
    Subject("1f938", "acrobat", "an acrobat doing a cartwheel", 18),
    Subject("1f423", "chick", "a chick hatching", 24),
    Subject("1f422", "turtle", "a turtle hiding in its shell", 18),
    Subject("1f44f", "pair of hands", "a pair of hands clapping", 4),
    Subject("1f483", "dancer", "a dancer dancing", 0),
    Subject("1f3ca", "swimmer", "a swimmer swimming", 30),
    Subject("23f0", "alarm clock", "an alarm clock ringing", 3),
    Subject("1f31e", "smiling sun", "a smiling sun spinning", 0),
    Subject("1f991", "squid", "a squid waving its arms", 20),
    Subject("1f602", "laughing face", "a face laughing", 20),
    Subject("1f62d", "crying face", "a face crying", 20),
    Subject("1f6fc", "roller skate", "a roller skate rolling", 24),
    Subject("1f409", "dragon", "a dragon moving its head", 12),
)

BACKGROUNDS: tuple[Background, ...] = (
    Background("plain white", "on a white background"),
    Background("plain red", "on a red background"),
    Background("plain yellow", "on a yellow background"),
    Background("plain pink", "on a pink background"),
    Background("blue sky", "on a blue sky"),
    Background("grass", "on green grass"),
    Background("night", "at night"),
    Background("snow", "in the snow"),
    Background("desert", "in the desert"),
    Background("sea", "by the sea"),
)

SPEEDS: tuple[Speed, ...] = (
    Speed("slow", "slowly", "in slow motion", 0.5),
    Speed("normal", "", "", 1.0),
    Speed("fast", "fast", "quickly", 2.0),
    Speed("still", "standing still", "still", 0.0),
)

STYLES: tuple[Style, ...] = (
    Style("full", action=True, background=True),
    Style("full, other words", action=True, background=True, synonym=True),
    Style("no action", action=False, background=True),
    Style("no background", action=True, background=False),
    Style("name only", action=False, background=False, synonym=True),
)


def subjects_named(prompts: Iterable[str]) -> tuple[int, ...]:
    """Indices of the recipe's subjects that a model's prompts name. Raises SettingsError if there are none."""
    listed = tuple(prompts)
    found = tuple(i for i, s in enumerate(SUBJECTS) if any(p.startswith(f"{s.caption} ") for p in listed))
    if not found:
        raise SettingsError("the model lists no prompt of the default recipe: only its models are known here")
    return found


def is_held_out(subject_index: int, background_index: int) -> bool:
    """Whether this combination is kept for validation.

    For each subject, one background in ten is kept. It differs between neighbouring subjects, because 3 is coprime to
    10. So every subject and every background is still seen in training.
    """
    return (3 * subject_index + background_index) % 10 == 7


def with_article(noun: str) -> str:
    """`noun` with "a" or "an" before it, by its first letter."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def caption(subject: Subject, background: Background | None, speed: Speed, style: Style = STYLES[0]) -> str:
    """The lower-case prompt for a clip, such as "a whale flapping its tail on a blue sky, slowly".

    The caption of a still subject does not name its action, which would contradict the picture: "a whale on a blue sky,
    standing still". `background=None` leaves the background out in every style.
    """
    text = subject.caption if style.action and speed.factor > 0 else with_article(subject.name)
    if background is not None and style.background:
        text = f"{text} {background.caption}"
    suffix = speed.synonym if style.synonym else speed.phrase
    return f"{text}, {suffix}" if suffix else text


def vocabulary() -> tuple[str, ...]:
    """Every word that `caption` can produce, in lower case and sorted."""
    texts = (
        caption(subject, background, speed, style)
        for subject in SUBJECTS
        for background in BACKGROUNDS
        for speed in SPEEDS
        for style in STYLES
    )
    return tuple(sorted({word for text in texts for word in re.findall(r"[a-z]+", text)}))
