// One call of bias_leaky_relu or of its backward, checked. x is dense: [outer][channels][inner] in memory. NCHW has
// inner = H * W, NHWC has outer = N * H * W and inner = 1.
#pragma once
#include "common.h"

namespace gan_ops {

struct BiasLeakyRelu {
  Type type;
  int64_t outer, channels, inner;
  const void* x;  // forward: x; backward: dy
  void* y;        // forward: y; backward: dx
  const void* bias;  // forward: [channels] in x's type, or null
  uint8_t* bits;     // [ceil(numel / 8)], written forward, read backward; bit i % 8 of byte i / 8 says whether element i
                     // of x + bias is positive, in memory order
  double slope, gain;
  void* dbias = nullptr;  // backward: [channels] in x's type, or null where nobody wants it
  void* workspace = nullptr;  // backward with dbias: bias_leaky_relu_cuda_workspace(call) bytes on the device
};

// Launch on `stream` (a cudaStream_t) of the current device. Return null, or what CUDA said.
const char* bias_leaky_relu_cuda(const BiasLeakyRelu& call, void* stream);
const char* bias_leaky_relu_backward_cuda(const BiasLeakyRelu& call, void* stream);
int64_t bias_leaky_relu_cuda_workspace(const BiasLeakyRelu& call);

}  // namespace gan_ops
