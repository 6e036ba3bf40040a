"""The common style of all pictures of a report: palette, fonts, and how a figure becomes a PNG.

There is one palette, which can be read with colour-blind eyes and in grey: Okabe and Ito's colours for categories, and
viridis wherever a colour means "when" (dark: generated early, light: late). Matplotlib is imported when the first
picture is drawn.
"""

import functools
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

P = ParamSpec("P")

BLUE, ORANGE, VERMILLION, SKY = "#0072b2", "#e69f00", "#d55e00", "#56b4e9"
INK, FAINT = "#222222", "#ececec"
GIVEN = "#d9d9d9"  # tokens of a prompt: no network call made them
MONOSPACE = "DejaVu Sans Mono"
_SETTINGS: "dict[RcKeyType, Any]" = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "text.parse_math": False,
    "savefig.facecolor": "white",
}


def styled(draw: Callable[P, bytes]) -> Callable[P, bytes]:
    """Makes a function draw with the settings of this file; the caller's matplotlib settings stay as they were."""

    @functools.wraps(draw)
    def draw_styled(*args: P.args, **kwargs: P.kwargs) -> bytes:
        import matplotlib

        with matplotlib.rc_context(_SETTINGS):
            return draw(*args, **kwargs)

    return draw_styled


def new_figure(width: float, height: float) -> "Figure":
    """A figure of this many inches, outside pyplot: no global state, no window system, nothing to close."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: "Figure") -> bytes:
    """The finished figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def call_color(call: int, num_calls: int) -> str:
    """`#rrggbb` of network call `call` (1 .. num_calls; 0: given as prompt): viridis from dark to light.

    Up to 128 calls all have different colours. Of more calls, neighbours may share one.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps["viridis"]((call - 1) / max(num_calls - 1, 1))) if call > 0 else GIVEN


def ink_on(color: str) -> str:
    """Black or white, whichever has more contrast on `#rrggbb` (relative luminance of the WCAG)."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.18 else "#ffffff"
