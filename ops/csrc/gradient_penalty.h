// The three maps that gradient penalties are made of, over samples [n][size], dense. Per-sample numbers are f64 if type
// is f64, else f32. Sums are taken in f64; on a GPU those over 16 bytes of a at a time are taken in the per-sample type
// first.
#pragma once
#include "common.h"

namespace gan_ops {

struct Samples {
  Type type;            // of a, b and y
  int64_t n, size;
  const void* a;
  const void* b;
  const void* weight;   // [n]
  void* y;
  void* workspace = nullptr;  // sample_dot_cuda_workspace(call) bytes on the device
};

// Launch on `stream` (a cudaStream_t) of the current device. Return null, or what CUDA said.
const char* sample_dot_cuda(const Samples& call, void* stream);    // y[i] = sum_j a[i][j] * b[i][j]; y: [n] of the per-sample type
const char* sample_scale_cuda(const Samples& call, void* stream);  // y[i][j] = weight[i] * a[i][j]
const char* sample_lerp_cuda(const Samples& call, void* stream);   // y[i][j] = weight[i] * a[i][j] + (1 - weight[i]) * b[i][j]
int64_t sample_dot_cuda_workspace(const Samples& call);

}  // namespace gan_ops
