"""Sizes that must divide: which ones near a given one do."""


def multiples_around(number: int, divisor: int, most: int | None = None) -> list[int]:
    """The multiples of `divisor` next to a number that is not one: below it and above it, of those from 1 to `most`."""
    below = number // divisor * divisor
    if most is not None:
        below = min(below, most // divisor * divisor)
    above = below + divisor
    return [size for size in (below, above) if size > 0 and (most is None or size <= most)]


def nearest(number: int, divisor: int, most: int | None = None) -> str:
    """The same for the end of a message: `nearest: 30 and 33`."""
    sizes = multiples_around(number, divisor, most)
    if not sizes:
        return f"no multiple of {divisor} is at most {most}"
    return f"nearest: {' and '.join(map(str, sizes))}"
