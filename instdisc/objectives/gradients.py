"""Which gradients the objectives give, and which they refuse: those of the features, once.

The gradients of their custom functions are computed in the forward pass, as constants. Rows of the bank, Z and τ are
taken as given.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def require_fixed(**values: Tensor | float) -> None:
    """Raise ValueError for a tensor that requires gradients: the objectives would leave them out without a word."""
    for name, value in values.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"{name}: found a tensor that requires gradients, expected one without: objectives give gradients to "
                "the features alone. Pass it detached, or write a loss of your own for rows that are trained"
            )


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a second derivative through a function's `backward` an error.

    torch's `once_differentiable` does so only where the gradient that comes in requires gradients itself; a constant
    one, such as that of a sum, would leave the function out of the second derivative without a word.
    """
    once = once_differentiable(backward)

    @wraps(backward)
    def guarded(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            grad_outputs = tuple(
                g if g is None or g.requires_grad else g.detach().requires_grad_() for g in grad_outputs
            )
        return once(ctx, *grad_outputs)

    return guarded
