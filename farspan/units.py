"""Quantities for people: three digits and a unit."""

BYTES = [(2.0 ** (10 * power), f"{prefix}B") for power, prefix in enumerate(("", "Ki", "Mi", "Gi", "Ti", "Pi"))]
SECONDS = [(1e-6, "µs"), (1e-3, "ms"), (1.0, "s")]
FLOPS = [(1e9, "GFLOP"), (1e12, "TFLOP"), (1e15, "PFLOP")]


def readable(value: float, units: list[tuple[float, str]]) -> str:
    """Return a value in the greatest unit that leaves at least 1, such as 1.25 ms or 34.1 GiB."""
    if value == 0:
        return "0"
    scale, unit = next(((scale, unit) for scale, unit in reversed(units) if value >= scale), units[0])
    scaled = value / scale
    return f"{scaled:.3g} {unit}" if scaled < 999.5 else f"{scaled:,.0f} {unit}"
