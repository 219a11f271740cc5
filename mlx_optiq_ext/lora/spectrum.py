"""Spectra of quantization errors: how much of the damage each further rank could take away.

Plain numbers; knows no model. Used by ``ranks``; measured by ``residual``.
"""

import numpy as np
import numpy.typing as npt

__all__ = ["Spectrum", "noise_spectrum", "shares"]

Spectrum = npt.NDArray[np.float64]
"""Squared singular values, largest first; of experts summed over them."""

_GRID = 4096


def shares(spectrum: Spectrum) -> Spectrum:
    """What part of the error's energy each rank holds; sums to 1, all zero where there is no error."""
    total = float(spectrum.sum())
    return spectrum / total if total > 0 else np.zeros_like(spectrum)


def noise_spectrum(rows: int, columns: int) -> Spectrum:
    """Expected spectrum of a matrix of independent errors, min(rows, columns) values, mean 1.

    It stands for the spectrum of a quantization error whose weights are not at hand: rounding errors are
    nearly independent. The inputs' second moments, which make real spectra steeper, are left out.

    Source: Marchenko and Pastur 1967; quantiles of the limiting density.
    """
    small, large = sorted((rows, columns))
    root = np.sqrt(small / large)
    # λ = 1 + root² + 2·root·cos θ turns √((b−λ)(λ−a))·dλ into a multiple of sin² θ dθ.
    theta = np.linspace(np.pi, 0.0, _GRID)
    values = 1 + root**2 + 2 * root * np.cos(theta)
    density = np.sin(theta) ** 2 / np.maximum(values, 1e-12)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    wanted = (np.arange(small) + 0.5) / small
    quantiles = np.interp(wanted, mass / mass[-1], values)
    return np.asarray((quantiles / quantiles.mean())[::-1], dtype=np.float64)
