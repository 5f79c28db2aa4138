// One call of upfirdn2d, checked: what ops/upfirdn2d.py documents, as numbers and addresses.
#pragma once
#include "common.h"

namespace gan_ops {

struct Axis {
  int64_t in, out;      // pixels, both at least 1
  int up, down, taps;   // all at least 1; out = (in * up + pad_before + pad_after - taps) / down + 1
  int64_t pad;          // zeros before the upsampled row; negative crops
};

struct Upfirdn2d {
  Type type;            // of x and y
  bool channels_last;   // memory order of x and y, both dense: NHWC or NCHW
  int64_t n, c;
  Axis vertical, horizontal;
  const void *x, *filter;  // filter: [taps] if separable, else [vertical.taps][horizontal.taps]; f64 if type is f64, else f32
  void* y;
  bool separable, flip;    // flip: correlate instead of convolve
  double gain;             // multiplies the result
};

// Launches on `stream` (a cudaStream_t) of the current device. Returns null, or what CUDA said.
const char* upfirdn2d_cuda(const Upfirdn2d& call, void* stream);

}  // namespace gan_ops
