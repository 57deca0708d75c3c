"""How far a share of so many images can be trusted."""

import math

Z95 = 1.959963984540054


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95% interval of a proportion (Wilson, 1927): stays in [0, 1] and is right at its ends.

    Raises:
        ValueError: There are no trials, or more successes than trials.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"successes must be in 0..n with n at least 1, got {successes} of {n}")
    share, z2 = successes / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return (low if successes else 0.0), (high if successes < n else 1.0)  # exact at the ends
