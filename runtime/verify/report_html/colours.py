"""Colour scales as CSS variables: one set on white, one on dark grey; more always means further from the page.

The sequential scale runs from pale yellow over green to dark blue, the diverging one from purple over grey to orange:
both keep their order for readers with any colour blindness, and in grey print.
"""

NUM_STEPS = 16
# ends and stations of the scales; YlGnBu and PuOr of ColorBrewer, mako on dark
_LIGHT = ("f6f8dc", "c7e9b4", "7fcdbb", "41b6c4", "1d91c0", "225ea8", "253494", "0b1f5c")
_DARK = ("23202f", "382a54", "3f4a85", "3775a1", "369fac", "60ceac", "a8e1bc", "e4f7e9")
_LIGHT_DIVERGING = ("3f1268", "7a64ab", "b9aed6", "eeeef2", "fbcf94", "d9811c", "8a4406")
_DARK_DIVERGING = ("c9b3ff", "9079cf", "574c82", "2a2b31", "7d5a2c", "c9832e", "ffc873")


def ramp(stations: tuple[str, ...], count: int = NUM_STEPS) -> list[str]:
    """Return so many colours at equal distances along the stations, as #rrggbb."""
    rgb = [[int(station[at : at + 2], 16) for at in (0, 2, 4)] for station in stations]
    colours = []
    for index in range(count):
        place = index / (count - 1) * (len(rgb) - 1)
        left = min(int(place), len(rgb) - 2)
        share = place - left
        mixed = [round(a + (b - a) * share) for a, b in zip(rgb[left], rgb[left + 1], strict=True)]
        colours.append("#" + "".join(f"{part:02x}" for part in mixed))
    return colours


def variables(*, dark: bool) -> str:
    """Return the CSS declarations --s0 to --s15 (sequential), --d0 to --d15 and --dm, their middle (diverging)."""
    sequential, diverging = (_DARK, _DARK_DIVERGING) if dark else (_LIGHT, _LIGHT_DIVERGING)
    sets = {"s": ramp(sequential), "d": ramp(diverging)}
    steps = "".join(f"--{key}{index}:{colour};" for key, ramped in sets.items() for index, colour in enumerate(ramped))
    return f"{steps}--dm:#{diverging[len(diverging) // 2]};"


def classes() -> str:
    """Return the CSS rules that fill the classes of those names."""
    names = [f"{key}{index}" for key in "sd" for index in range(NUM_STEPS)]
    return "".join(f".{name}{{fill:var(--{name})}}" for name in (*names, "dm"))
