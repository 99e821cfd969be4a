"""Sizes of the maps that convolutions make."""

from __future__ import annotations

from core.cli.errors import UserError


def conv_output_size(size: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> int:
    """Output size in pixels of a convolution: (N + 2P - D(F-1) - 1)/S + 1, rounded down.

    Raises:
        UserError: the kernel is larger than the padded input, or a parameter is out of range.
    """
    _check_geometry(size, kernel, stride, padding, dilation)
    reach = dilation * (kernel - 1) + 1
    if size + 2 * padding < reach:
        raise UserError(
            f"a convolution with kernel {kernel}, dilation {dilation} spans {reach} pixels, but its input has only "
            f"{size} + 2*{padding} padding: use a larger image, more padding or fewer layers"
        )
    return (size + 2 * padding - reach) // stride + 1


def transposed_output_size(
    size: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1, output_padding: int = 0
) -> int:
    """Output size in pixels of a transposed convolution: (N-1)S - 2P + D(F-1) + output_padding + 1.

    Raises:
        UserError: nothing would be left, or a parameter is out of range.
    """
    _check_geometry(size, kernel, stride, padding, dilation)
    if not 0 <= output_padding < max(stride, dilation):
        raise UserError(f"output_padding={output_padding} must be at least 0 and below stride or dilation")
    result = (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1
    if result < 1:
        raise UserError(
            f"a transposed convolution with kernel {kernel}, stride {stride}, padding {padding} leaves {result} "
            f"pixels of {size}: use less padding or a larger kernel"
        )
    return result


def _check_geometry(size: int, kernel: int, stride: int, padding: int, dilation: int) -> None:
    for name, value in (("size", size), ("kernel", kernel), ("stride", stride), ("dilation", dilation)):
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    if padding < 0:
        raise UserError(f"padding={padding} must be at least 0")
