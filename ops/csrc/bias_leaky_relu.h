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
  Activation activation;  // bits are written forward, read backward
  void* dbias = nullptr;  // backward: [channels] in x's type, or null where nobody wants it
  void* workspace = nullptr;  // backward with dbias: bias_leaky_relu_cuda_workspace(call) bytes on the device
};

void bias_leaky_relu_cpu(const BiasLeakyRelu& call);  // y may be x; on CUDA it may not

// Launch on `stream` (a cudaStream_t) of the current device. Return null, or what CUDA said.
const char* bias_leaky_relu_cuda(const BiasLeakyRelu& call, void* stream);
const char* bias_leaky_relu_backward_cuda(const BiasLeakyRelu& call, void* stream);
int64_t bias_leaky_relu_cuda_workspace(const BiasLeakyRelu& call);

}  // namespace gan_ops
