"""The one `torch.library.Library` of the project: here an op gets its schema, kernels and autograd rule."""

import os
import threading
from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("gan_ops", "DEF")
_kernels = ""  # what kernels() found; empty until it is first asked
_choosing = threading.Lock()


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


def kernels() -> str:
    """Which kernels serve this process, "compiled" or "reference". A Python face asks before it dispatches.

    The first call loads the compiled ones, and compiles them if nobody on this machine has: see `ops.choice`. Raises
    BuildError where SADDLE_OPS asks for what cannot be had.
    """
    global _kernels
    if not _kernels:
        from ops.choice import choose

        with _choosing:
            _kernels = _kernels or choose()
    return _kernels


# torch.compile then calls it once while tracing instead of tracing into the compiler. This is what
# torch.compiler.assume_constant_result does; that imports all of torch._dynamo, which import ops must not wait for.
kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _new_lock() -> None:
    global _choosing
    _choosing = threading.Lock()


os.register_at_fork(after_in_child=_new_lock)  # another thread of the parent may have held it
