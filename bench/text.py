"""Times and sizes for people."""

UNITS = {"copy": "GB/s", "matmul": "GFLOP/s"}  # of a ceiling, and of the work that it bounds


def time_text(seconds: float) -> str:
    unit, scale = ("us", 1e6) if seconds < 1e-3 else ("ms", 1e3) if seconds < 1 else ("s", 1)
    value = seconds * scale
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def bytes_text(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
