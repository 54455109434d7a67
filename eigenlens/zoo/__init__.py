"""Models that ship with the package, and the script that trains them."""

from pathlib import Path

ARITH_TINY = Path(__file__).parent / "arith-tiny"
