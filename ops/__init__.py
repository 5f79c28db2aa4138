"""Fused ops that can be differentiated as often as wanted: resampling by FIR filters, and bias + leaky ReLU.

Each op is one file: the Python face (checks its arguments), the reference kernel, the schema, the fake kernel and
the autograd rule. The dispatcher namespace is `gan_ops::`. The reference kernels are plain PyTorch and serve every
device (`CompositeExplicitAutograd`); a compiled kernel registered for a device takes precedence over them.
"""

from ops.bias_leaky_relu import bias_leaky_relu
from ops.upfirdn2d import downsample2d, filter2d, setup_filter, upfirdn2d, upsample2d

__all__ = ["bias_leaky_relu", "downsample2d", "filter2d", "setup_filter", "upfirdn2d", "upsample2d"]
