"""Ops that can be differentiated as often as wanted: convolution, resampling by FIR filters, bias + leaky ReLU, and the
norms and interpolations of gradient penalties.

Each op is one file: the Python face (checks its arguments), the reference kernel, the schema, the fake kernel and
the autograd rule. The dispatcher namespace is `gan_ops::`. The reference kernels are plain PyTorch and serve every
device (`CompositeExplicitAutograd`); the compiled kernels of csrc/, registered for a device, take precedence over them.
So do the rules of csrc/autograd.cpp (`AutogradCPU`, `AutogradCUDA`): those of the ops that a training step calls most
are there a second time, because a rule in Python takes longer than a small network's kernels. Whoever changes one
changes both; tests/test_rules.py compares them. All of csrc/ is compiled and loaded at the first call of an op
(`ops.build`, `ops.choice`), never at import.
"""

from ops.bias_leaky_relu import bias_leaky_relu
from ops.conv2d import conv2d
from ops.gradient_penalty import gradient_penalty, interpolate_samples, root, squared_norm
from ops.memory import keep_pages
from ops.upfirdn2d import downsample2d, setup_filter, upfirdn2d, upsample2d

__all__ = [
    "bias_leaky_relu",
    "conv2d",
    "downsample2d",
    "gradient_penalty",
    "interpolate_samples",
    "root",
    "setup_filter",
    "squared_norm",
    "upfirdn2d",
    "upsample2d",
]

keep_pages()
