"""What others have measured on the eight benchmarks: Table 1 of the PeRL paper, as printed."""

SOURCE = "† published, arXiv 2506.14907"

_NAMES = (
    *("mantis_eval", "blink", "mmiu", "mathvista", "mathverse", "mathvision", "remi", "mv_math"),
    "average",
)


def _row(*percent: float) -> dict[str, float]:
    return dict(zip(_NAMES, percent, strict=True))


PUBLISHED: dict[str, dict[str, float]] = {
    "LLaVA-OneVision": _row(64.20, 48.20, 40.32, 63.20, 26.20, 18.30, 13.69, 18.80, 36.61),
    "InternVL2.5-8B": _row(67.00, 54.80, 46.70, 64.40, 39.50, 19.70, 30.92, 16.84, 42.48),
    "Qwen2-VL-7B": _row(69.60, 53.20, 52.76, 58.20, 32.50, 16.30, 28.62, 14.53, 40.71),
    "Migician": _row(69.12, 51.53, 52.32, 58.90, 30.10, 19.60, 8.73, 14.88, 38.15),
    "R1-VL-7B": _row(64.81, 55.00, 46.58, 63.50, 40.00, 24.70, 24.31, 18.77, 42.62),
    "R1-Onevision-7B": _row(71.76, 32.38, 46.48, 64.10, 46.40, 29.90, 36.96, 19.06, 43.38),
    "MM-Eureka 7B": _row(69.91, 51.49, 51.67, 73.00, 50.30, 26.90, 43.31, 24.39, 49.49),
    "Noisy-K12 7B": _row(73.15, 54.23, 52.13, 72.90, 52.80, 28.90, 41.27, 24.99, 50.05),
    "Qwen2.5-VL-7B": _row(70.80, 55.23, 52.00, 68.20, 46.30, 25.07, 36.38, 20.41, 47.90),
    "PeRL 7B": _row(76.39, 58.53, 54.23, 73.00, 49.56, 28.26, 43.38, 25.68, 51.13),
}
"""Percent by benchmark. The averages are those printed; some are not the mean of the eight numbers beside them
(Qwen2.5-VL-7B: 47.90 printed, 46.80 computed). ReMI of PeRL is 41.65 in Table 2 of the same paper."""
