"""The whole study in minutes, on any machine: scikit-learn's 1,797 real digits, an 8-pixel Swin of four blocks, K=4.

Result: `profiling/results/accuracy/digits.md`: one seed of 10 epochs, from which nothing follows yet. The run with an exact
finish went on from the state of the `feature` run after epoch 8, which it equals bit for bit up to there.
Time: not measured on an idle machine; 43,000 images per run of 30 epochs.
Command:

    fastlocal bench accuracy --recipe digits

An easy task with 360 validation images (one is 0.28 %): it shows that the machinery works, and large effects. What is true
of harder tasks it cannot tell; `swin_cifar` is for that.
"""

from fastlocal.profiling.accuracy.recipe import OfEpochs, Recipe

_FEATURE = {"objective": "feature"}

RECIPE = Recipe(
    base={"modules": 4},  # the rest is the recipe that fastlocal train has for digits
    tasks={"digits": {"data": "digits"}},
    variants={
        "end-to-end": {"objective": "end-to-end"},
        "feature": _FEATURE,
        "feature, last 20 % exact": {**_FEATURE, "exact_epochs": OfEpochs(0.2)},
        "feature, every 5th step exact": {**_FEATURE, "exact_every": 5},
        "feature, look-ahead 1": {**_FEATURE, "lookahead": 1},
        "cross-entropy": {"objective": "cross-entropy"},
        "cross-entropy, last 20 % exact": {"objective": "cross-entropy", "exact_epochs": OfEpochs(0.2)},
    },
)
