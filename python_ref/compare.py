"""What counts as close. The one definition is the package's own, which its users have too: ``peft_kernels.testing``."""

from peft_kernels.testing import (
    FLOOR_IN_EPS,
    MAXIMUM_FLOOR_IN_EPS,
    MAXIMUM_RELATIVE_TO_EAGER,
    RELATIVE_TO_EAGER,
    Report,
    assert_bitwise_equal,
    assert_close,
    relative_error,
)

__all__ = [
    "FLOOR_IN_EPS",
    "MAXIMUM_FLOOR_IN_EPS",
    "MAXIMUM_RELATIVE_TO_EAGER",
    "RELATIVE_TO_EAGER",
    "Report",
    "assert_bitwise_equal",
    "assert_close",
    "relative_error",
]
