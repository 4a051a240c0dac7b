"""The curves of the demos: each formula's losses step by step, and their mean on top."""

import matplotlib

matplotlib.use("Agg")  # no display is needed, nor looked for

import numpy as np
from matplotlib import pyplot as plt

from bench.demos import curves
from bench.demos.curves import REACH
from bench.plot import STYLES
from bench.rivals import FUSED

STEPS = 1000
NAMES = ("eager_composition", FUSED)


def test_pale_losses_and_their_mean() -> None:
    rng = np.random.default_rng(0)
    first = np.exp(rng.normal(size=STEPS))
    second = first.copy()
    second[1] += 0.5  # a step that is none of the points
    plain = {
        "device": "CPU, 1 thread",
        "torch": "2",
        **curves.compared({NAMES[0]: first.tolist(), NAMES[1]: second.tolist()}),
    }
    np.testing.assert_allclose(plain["largest_difference"], 0.5)
    figure, (above, below) = plt.subplots(2)
    curves.draw((above, below), plain, "loss", {name: name for name in NAMES})
    spacing = STEPS // curves.POINTS
    points = first[::spacing]
    lines = above.get_lines()
    assert len(lines) == 2 * len(NAMES)
    for name, raw, smoothed in zip(NAMES, lines[::2], lines[1::2], strict=True):
        assert raw.get_color() == smoothed.get_color() == STYLES[name][0]
        assert raw.get_alpha() < 0.5
        assert smoothed.get_alpha() is None
        np.testing.assert_allclose(raw.get_ydata(), points)
        mean = np.asarray(smoothed.get_ydata())
        for at, around in (
            (0, slice(0, 1)),
            (1, slice(0, 3)),
            (100, slice(100 - REACH, 100 + REACH + 1)),
            (-1, slice(-1 - REACH, None)),
        ):
            own = points[around]
            np.testing.assert_allclose(mean[at], np.prod(own) ** (1 / len(own)), err_msg=f"{at}")
    title = above.get_title()
    assert f"geometric mean over {(2 * REACH + 1) * spacing} steps" in title
    assert "CPU, 1 thread, torch 2" in title
    plt.close(figure)
