// Every map reads and writes each element once, 16 bytes per access, LOADS accesses in flight per thread and operand.
#include "gradient_penalty.h"

#include "common.cuh"

namespace gan_ops {
namespace {

constexpr int THREADS = 256, LOADS = 4;
constexpr int DOT_BYTES = 64 << 10;  // of each operand per block: long enough to hide the reduction at its end

// Products are summed in float over one access, from there on in double: consumer GPUs have 1/64 of the units for it.
template <class T, int N>
__global__ void __launch_bounds__(THREADS) dot_kernel(Samples call, unsigned splits) {
  const int64_t sample = blockIdx.x / splits;
  const T* a = static_cast<const T*>(call.a) + sample * call.size;
  const T* b = static_cast<const T*>(call.b) + sample * call.size;
  constexpr int CHUNK = THREADS * LOADS * N;
  double sum = 0;
  for (int64_t chunk = blockIdx.x % splits; chunk * CHUNK < call.size; chunk += splits) {
    const int64_t first = chunk * CHUNK + threadIdx.x * N;
    Pack<T, N> left[LOADS], right[LOADS];
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
      const int64_t j = first + k * THREADS * N;
      left[k] = load<T, N>(a + j, j < call.size);
      right[k] = load<T, N>(b + j, j < call.size);
    }
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
      Wide<T> x[N], y[N], products = 0;
      widen(left[k], x);
      widen(right[k], y);
#pragma unroll
      for (int i = 0; i < N; i++) products += x[i] * y[i];
      sum += products;
    }
  }
  sum = block_sum<THREADS>(sum);
  if (threadIdx.x == 0) static_cast<double*>(call.workspace)[blockIdx.x] = sum;
}

template <class T>
__global__ void __launch_bounds__(THREADS) dot_finish_kernel(Samples call, unsigned splits) {
  const double* partial = static_cast<const double*>(call.workspace) + int64_t(blockIdx.x) * splits;
  double sum = 0;
  for (unsigned i = threadIdx.x; i < splits; i += THREADS) sum += partial[i];
  sum = block_sum<THREADS>(sum);
  if (threadIdx.x == 0) static_cast<Wide<T>*>(call.y)[blockIdx.x] = static_cast<Wide<T>>(sum);
}

template <class T, int N, bool LERP>
__global__ void __launch_bounds__(THREADS) map_kernel(Samples call, unsigned chunks) {
  const int64_t sample = blockIdx.x / chunks;
  const int64_t first = (int64_t(blockIdx.x % chunks) * LOADS * THREADS + threadIdx.x) * N;
  const Wide<T> weight = static_cast<const Wide<T>*>(call.weight)[sample];
  const T* a = static_cast<const T*>(call.a) + sample * call.size;
  const T* b = static_cast<const T*>(call.b) + sample * call.size;
  T* y = static_cast<T*>(call.y) + sample * call.size;
  Pack<T, N> left[LOADS], right[LOADS];
#pragma unroll
  for (int k = 0; k < LOADS; k++) {
    const int64_t j = first + k * THREADS * N;
    left[k] = load<T, N>(a + j, j < call.size);
    if constexpr (LERP) right[k] = load<T, N>(b + j, j < call.size);
  }
#pragma unroll
  for (int k = 0; k < LOADS; k++) {
    const int64_t j = first + k * THREADS * N;
    Wide<T> out[N], other[N];
    widen(left[k], out);
    if constexpr (LERP) widen(right[k], other);
#pragma unroll
    for (int i = 0; i < N; i++) {
      out[i] *= weight;
      if constexpr (LERP) out[i] += (1 - weight) * other[i];
    }
    if (j < call.size) store<T, N>(y + j, out);
  }
}

unsigned dot_splits(const Samples& call) {
  return static_cast<unsigned>(ceil_divide(call.size * size_of(call.type), DOT_BYTES));
}

template <bool LERP>
const char* map(const Samples& call, void* stream) {
  return for_type(call.type, [&](auto zero) {
    using T = decltype(zero);
    const bool packed = call.size % FULL<T> == 0 && aligned({call.a, LERP ? call.b : call.a, call.y});
    const int64_t chunks = ceil_divide(call.size, THREADS * LOADS * (packed ? FULL<T> : 1));
    const auto kernel = packed ? map_kernel<T, FULL<T>, LERP> : map_kernel<T, 1, LERP>;
    const auto blocks = static_cast<unsigned>(call.n * chunks);
    kernel<<<blocks, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(call, static_cast<unsigned>(chunks));
    return launched();
  });
}

}  // namespace

int64_t sample_dot_cuda_workspace(const Samples& call) { return call.n * dot_splits(call) * int64_t(sizeof(double)); }

const char* sample_dot_cuda(const Samples& call, void* stream) {
  return for_type(call.type, [&](auto zero) {
    using T = decltype(zero);
    const unsigned splits = dot_splits(call), samples = static_cast<unsigned>(call.n);
    const bool packed = call.size % FULL<T> == 0 && aligned({call.a, call.b});
    const auto kernel = packed ? dot_kernel<T, FULL<T>> : dot_kernel<T, 1>;
    kernel<<<samples * splits, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(call, splits);
    if (const char* error = launched()) return error;
    const auto finish = dot_finish_kernel<T>;
    finish<<<samples, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(call, splits);
    return launched();
  });
}

const char* sample_scale_cuda(const Samples& call, void* stream) { return map<false>(call, stream); }
const char* sample_lerp_cuda(const Samples& call, void* stream) { return map<true>(call, stream); }

}  // namespace gan_ops
