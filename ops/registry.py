"""The one `torch.library.Library` of the project: here an op gets its schema, kernels and autograd rule."""

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("gan_ops", "DEF")


def register(schema: str, *, reference: Callable, fake: Callable, setup_context: Callable, backward: Callable) -> None:
    """Define `gan_ops::<schema>` with its reference kernel, shape rule and autograd rule.

    `backward` must call registered ops or differentiable torch functions only: whatever else it calls is a constant
    to the second derivative, and a gradient penalty built on it would silently be zero.
    """
    LIBRARY.define(schema)
    name = schema.split("(")[0]
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gan_ops::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"gan_ops::{name}", backward, setup_context=setup_context, lib=LIBRARY)
