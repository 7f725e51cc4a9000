"""The support tickets of lesson 11, and its two figures.

Twenty tickets are written by hand.  The others are patterns, sentences with a gap, each filled with four things; no pattern
stands in two splits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from distillkit.view.figures import ROLE_COLOURS, _figure, plain, style

FILLINGS = 4  # tickets of each pattern
BY_HAND = """
billing|I was charged twice for the same month, please correct it.
billing|My invoice shows a plan that I never ordered.
billing|How do I change the credit card you charge?
billing|The refund you promised last week is not on my account.
billing|Why did the price go up without any notice?
billing|Please send me a receipt with our tax number on it.
billing|The coupon code was accepted, but the total stayed the same.
delivery|My parcel was marked as delivered, but it is not here.
delivery|The driver left the box in the rain and everything is wet.
delivery|Can you bring it on Saturday instead?
delivery|I moved last month, the order went to my old flat.
delivery|Two of the five items are missing from the package.
delivery|It has been on its way for three weeks now.
delivery|I ordered a blue one and got a red one.
technical|After the update the app closes as soon as I open it.
technical|The device will not connect to my network.
technical|I forgot my password and the reset mail never comes.
technical|The display flickers when the battery is low.
technical|It says error 27 and stops, what does that mean?
technical|The left speaker has been silent since yesterday.
"""
PATTERNS = {
    "train": {
        "billing": [
            "I was charged twice for {}.",
            "The invoice for {} has the wrong address.",
            "Why is there a fee on my card for {}?",
            "Please refund the money for {}.",
            "My discount was not taken off the price of {}.",
            "The payment for {} failed, but my bank says it went through.",
            "I need a receipt for {} for the tax office.",
            "Your bill for {} is higher than the offer.",
            "Can I pay for {} by bank transfer?",
        ],
        "delivery": [
            "{} has still not arrived.",
            "The parcel with {} was left at the wrong door.",
            "When will {} be shipped?",
            "The box with {} came open and half empty.",
            "Please send {} to my new address.",
            "The courier with {} did not ring.",
            "Tracking has shown no change for {} since Monday.",
            "I got somebody else's package instead of {}.",
            "May I collect {} at your shop?",
        ],
        "technical": [
            "{} does not switch on.",
            "The app crashes when I connect {}.",
            "The screen of {} stays black.",
            "I cannot log in to set up {}.",
            "{} loses the wireless connection every hour.",
            "An error code appears when I start {}.",
            "How do I reset {} to its first settings?",
            "The battery of {} is empty after ten minutes.",
            "{} makes a humming noise.",
        ],
    },
    "validation": {
        "billing": [
            "The amount on the invoice for {} is wrong.",
            "I paid for {} two times.",
            "Where do I find the receipt for {}?",
            "I returned {}, when do I get my money?",
        ],
        "delivery": [
            "{} was sent to the wrong street.",
            "The package with {} is late.",
            "The driver took {} back with him.",
            "Part of {} was missing in the box.",
        ],
        "technical": [
            "{} shows an error and restarts.",
            "My login for {} no longer works.",
            "There is no sound from {}.",
            "The update broke {}.",
        ],
    },
    "test": {
        "billing": [
            "Two debits for {} stand in my account.",
            "What you took for {} is more than you had quoted.",
            "I sent {} back and am waiting for my money.",
            "The voucher was ignored when I bought {}.",
            "Please put our company name on the bill for {}.",
            "I want my deposit for {} back.",
        ],
        "delivery": [
            "Where is {}?",
            "Nobody was at home, and now {} is gone.",
            "{} reached me in pieces, the carton was wet.",
            "My neighbour signed for {}, I never saw it.",
            "How many days until {} is here?",
            "The van with {} drove past my house.",
        ],
        "technical": [
            "{} freezes after a minute.",
            "My password is refused by {}.",
            "Nothing happens when I press the button of {}.",
            "{} gets hot and shuts down.",
            "Pairing {} with my phone fails.",
            "After the new version {} has no picture.",
        ],
    },
}
THINGS = ["the lamp", "my headphones", "the camera", "order 4711", "our printer", "the watch"]


def filled(split: str) -> list[tuple[str, str, str]]:
    """(text, label, pattern) of every ticket of a split that is made from a pattern."""
    rows = []
    for label, patterns in PATTERNS[split].items():
        for number, pattern in enumerate(patterns):
            for k in range(FILLINGS):
                text = pattern.format(THINGS[(number + k) % len(THINGS)])
                rows.append((text[0].upper() + text[1:], label, pattern))
    return rows


def support_tickets() -> tuple[dict[str, list[tuple[str, str]]], list[str]]:
    """The (text, label) rows of each split, and the pattern of each test row."""
    written = [tuple(reversed(line.split("|"))) for line in BY_HAND.strip().splitlines()]
    rows = {split: [(text, label) for text, label, _ in filled(split)] for split in PATTERNS}
    rows["train"] = written + rows["train"]
    return rows, [pattern for _, _, pattern in filled("test")]


@style()
def bill(n_star: float, reached: str, trainings: int, distilling: float, full: float, small: float) -> Figure:
    """Operations in all against the number of trainings: on all rows each time, and distilled once.

    Args:
        n_star: trainings after which distilling has paid for itself; infinity where it never does.
        reached: the box of the drawing, for the title.
        trainings: the reader's own number.
        distilling, full, small: TFLOPs of distilling once, of a training on all rows and of one on the set.
    """
    figure, (axes,) = _figure(8, 3.8)
    times = np.array([1, 2, 5, 10, 20, 50, 100, 200, 500, 1000])
    axes.plot(times, times * full, "-", color=ROLE_COLOURS["full"], label="all rows each time")
    axes.plot(times, distilling + times * small, "-", color=ROLE_COLOURS["learned"], label="distil once, then the set")
    axes.axvline(trainings, color=ROLE_COLOURS["chance"], linestyle="--")
    axes.set(xscale="log", yscale="log", xlabel="trainings (logarithmic axis)", ylabel="TFLOPs in all (logarithmic)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    words = "1 training" if trainings == 1 else f"{trainings} trainings"
    side, height = ("left", 6) if trainings < 100 else ("right", -6), 0.35 if trainings < 3 else 0.04
    axes.annotate(words, (trainings, height), xycoords=("data", "axes fraction"), xytext=(side[1], 0), ha=side[0],
                  textcoords="offset points", color=ROLE_COLOURS["chance"])
    if math.isfinite(n_star) and n_star <= times[-1]:
        height = distilling + n_star * small
        axes.plot([n_star], [height], "o", ms=9, mfc="white", mew=2.5, color=ROLE_COLOURS["learned"], zorder=3)
        axes.annotate(f"n* = {n_star}", (n_star, height), xytext=(0, 10), textcoords="offset points",
                      ha="left" if n_star < 5 else "right", va="bottom", color=ROLE_COLOURS["learned"], fontweight="bold")
    axes.set_title(f"{words}, n* = {n_star}: {reached}")
    axes.legend(loc="upper left")
    return figure


@style()
def bars(accuracy: Mapping[str, float], scores: Mapping[str, Sequence[float]], chance: float) -> Figure:
    """Accuracies from the best to the worst, coloured by role.

    Args:
        accuracy: of each method; a name that ends with "all rows" is a method that reads all of them.
        scores: of the sets, the accuracy of each initialisation, drawn as dots.
        chance: what guessing gives.
    """
    roles = {"TF-IDF": "full", "linear": "full", "student": "full", "distilled": "learned", "words": "text",
             "keywords": "text", "start": "text"}
    legend = {"full": "all rows", "learned": "learned vectors", "text": "keywords and words", "real": "real tickets"}
    ranking = sorted(accuracy.items(), key=lambda item: -item[1])
    figure, (axes,) = _figure(8, 4.6)
    for place, (name, value) in enumerate(ranking):
        role = roles.get(name.split()[0].strip(","), "real")
        colour, label = ROLE_COLOURS[role], legend.pop(role, None)        # each role once in the legend
        face = colour if name.endswith("all rows") else "none"
        axes.barh(place, value, height=0.7, lw=2.5, edgecolor=colour, facecolor=face, label=label)
        dots = scores.get(name, ())
        axes.plot(dots, place + np.linspace(-0.17, 0.17, len(dots)), "o", ms=6, color=colour)
        axes.annotate(f"{value:.2f}", (1.02, place), xycoords=("axes fraction", "data"), va="center")
    axes.axvline(chance, color=ROLE_COLOURS["chance"], linestyle="--", label="chance")
    axes.set_yticks(range(len(ranking)), [plain(name) for name, _ in ranking])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.0), xlabel="accuracy on the test tickets (hollow: one set; dots: initialisations)")
    (first, best), learned = ranking[0], max(value for name, value in ranking if name.startswith("distilled"))
    axes.set_title(f"The {first} is first with {best:.2f}; the best learned set has {learned:.2f}")
    axes.legend(loc="lower right")
    axes.grid(axis="y", visible=False)
    return figure
