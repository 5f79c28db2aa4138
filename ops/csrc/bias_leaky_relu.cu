// Forward: blocks own runs of the flat tensor, so that any shape has whole bytes of signs. Backward: blocks own runs of
// one channel (NCHW) or of a few neighboring channels (NHWC), so that sums over channels need no atomics. Both move 16
// bytes per access with LOADS of them in flight per thread; packs of one element serve shapes that do not divide.
#include "bias_leaky_relu.h"

#include <algorithm>

#include "common.cuh"

namespace gan_ops {
namespace {

constexpr int THREADS = 256, LOADS = 4;
constexpr int64_t BLOCKS = 4096;  // about as many for the backward: enough to fill GPUs, few enough to sum up

template <class A>
struct Leaky {
  A slope, gain;
  explicit Leaky(const BiasLeakyRelu& call)
      : slope(static_cast<A>(call.slope)), gain(static_cast<A>(call.gain)) {}
};

// v = gain * leaky_relu(v), rounded as torch does it. Returns bit i for v[i] > 0.
template <int N, class A>
__device__ __forceinline__ unsigned activate(A* v, Leaky<A> leaky) {
  unsigned signs = 0;
#pragma unroll
  for (int i = 0; i < N; i++) {
    const bool positive = v[i] > 0;
    signs |= positive ? 1u << i : 0u;
    v[i] = (positive ? v[i] : v[i] * leaky.slope) * leaky.gain;
  }
  return signs;
}

// Neighboring threads with N signs each make a byte together, and all of them get it. The whole warp must come here.
template <int N>
__device__ __forceinline__ unsigned sign_byte(unsigned signs) {
  signs <<= N * (threadIdx.x % (8 / N));
#pragma unroll
  for (int distance = 1; distance < 8 / N; distance *= 2) signs |= __shfl_xor_sync(~0u, signs, distance);
  return signs;
}

// PER_ELEMENT: inner is 1 and a pack has a channel for each element. Else a pack lies in at most two channels.
template <class T, int N, bool PER_ELEMENT>
__global__ void __launch_bounds__(THREADS)
    forward_kernel(BiasLeakyRelu call, Leaky<Wide<T>> leaky, Divisor inner, Divisor channels) {
  using A = Wide<T>;
  const int64_t block = int64_t(blockIdx.x) * THREADS * LOADS * N;
  const int left = static_cast<int>(min(call.outer * call.channels * call.inner - block, int64_t(THREADS * LOADS * N)));
  const T* x = static_cast<const T*>(call.x) + block;
  const T* bias = static_cast<const T*>(call.bias);
  T* y = static_cast<T*>(call.y) + block;
  uint8_t* bits = call.bits + block / 8;

  Pack<T, N> packs[LOADS];
#pragma unroll
  for (int k = 0; k < LOADS; k++) {
    const int i = (k * THREADS + threadIdx.x) * N;
    packs[k] = load<T, N>(x + i, i < left);
  }
  __shared__ int first_channel, first_end;  // channel of the block's first element, and where its run of `inner` ends
  if (threadIdx.x == 0) {
    const int64_t plane = block / call.inner;
    first_channel = static_cast<int>(plane % call.channels);
    first_end = static_cast<int>(min((plane + 1) * call.inner - block, int64_t(1) << 30));
  }
  __syncthreads();

  int channel[LOADS], end[LOADS];  // of a pack's first element
  Pack<T, PER_ELEMENT ? N : 1> biases[LOADS];
#pragma unroll
  for (int k = 0; k < LOADS; k++) {
    const int i = (k * THREADS + threadIdx.x) * N;
    end[k] = first_end;
    channel[k] = first_channel;
    if constexpr (PER_ELEMENT) {
      channel[k] += i;
    } else if (int past = i - first_end; past >= 0) {
      channel[k] += 1 + inner.split(past);
      end[k] = i - past + static_cast<int>(inner.divisor);
    }
    channels.split(channel[k]);
    biases[k] = load<T, PER_ELEMENT ? N : 1>(bias + channel[k], bias != nullptr);
  }
#pragma unroll
  for (int k = 0; k < LOADS; k++) {
    const int i = (k * THREADS + threadIdx.x) * N;
    A v[N], b[PER_ELEMENT ? N : 1];
    widen(packs[k], v);
    widen(biases[k], b);
    if (PER_ELEMENT || end[k] >= i + N || bias == nullptr) {
#pragma unroll
      for (int j = 0; j < N; j++) v[j] += b[PER_ELEMENT ? j : 0];
    } else {
      const A next = widen(bias[channel[k] + 1 < call.channels ? channel[k] + 1 : 0]);
#pragma unroll
      for (int j = 0; j < N; j++) v[j] += i + j < end[k] ? b[0] : next;
    }
    const unsigned signs = activate<N>(v, leaky), byte = sign_byte<N>(i < left ? signs : 0);
    if (i < left) {
      store<T, N>(y + i, v);
      if (i % 8 == 0) bits[i / 8] = static_cast<uint8_t>(byte);
    }
  }
}

template <int N, class A>
__device__ __forceinline__ void activate_backward(A* v, unsigned signs, Leaky<A> leaky) {
#pragma unroll
  for (int i = 0; i < N; i++) v[i] = (signs >> i & 1 ? v[i] : v[i] * leaky.slope) * leaky.gain;
}

// Block (channel, split) has the packs split * length .. of a channel's outer * inner / N, in memory order.
template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    backward_planes_kernel(BiasLeakyRelu call, Leaky<Wide<T>> leaky, unsigned splits, int64_t length) {
  using A = Wide<T>;
  const int64_t channel = blockIdx.x / splits, per_plane = call.inner / N, total = call.outer * per_plane;
  const int64_t begin = blockIdx.x % splits * length + threadIdx.x, end = min(begin - threadIdx.x + length, total);
  const T* dy = static_cast<const T*>(call.x);
  T* dx = static_cast<T*>(call.y);

  // Where the thread is, and what THREADS packs further means: rows and columns as the hands of a clock.
  const int64_t step_planes = THREADS / per_plane, step = THREADS % per_plane, wrap = (call.channels - 1) * call.inner;
  int64_t column = begin % per_plane;
  int64_t at = (begin / per_plane * call.channels + channel) * call.inner + column * N;
  double sum = 0;
  for (int64_t i = begin; i < end; i += THREADS * LOADS) {
    Pack<T, N> packs[LOADS];
    unsigned signs[LOADS];
    int64_t addresses[LOADS];
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
      const bool inside = i + k * THREADS < end;
      addresses[k] = at;
      packs[k] = load<T, N>(dy + at, inside);
      signs[k] = inside ? call.bits[at / 8] >> at % 8 : 0;
      at += step_planes * call.channels * call.inner + step * N;
      column += step;
      if (column >= per_plane) {
        column -= per_plane;
        at += wrap;
      }
    }
    A some = 0;
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
      A v[N];
      widen(packs[k], v);
      activate_backward<N>(v, signs[k], leaky);
#pragma unroll
      for (int j = 0; j < N; j++) some += v[j];
      if (i + k * THREADS < end) store<T, N>(dx + addresses[k], v);
    }
    sum += some;
  }
  if (call.dbias == nullptr) return;
  sum = block_sum<THREADS>(sum);
  if (threadIdx.x == 0) static_cast<double*>(call.workspace)[blockIdx.x] = sum;
}

// Block (tile, split) has `width` packs of channels and the rows split * length .. of outer.
template <class T, int N>
__global__ void __launch_bounds__(THREADS) backward_channels_last_kernel(BiasLeakyRelu call, Leaky<Wide<T>> leaky,
                                                                         int width, unsigned splits, int64_t length) {
  using A = Wide<T>;
  const int height = THREADS / width, row = threadIdx.x / width, column = threadIdx.x % width;
  const int64_t split = blockIdx.x % splits, tile = int64_t(blockIdx.x / splits) * width * N;
  const int64_t channel = tile + column * N, end = min((split + 1) * length, call.outer);
  const bool active = row < height && channel < call.channels;
  const T* dy = static_cast<const T*>(call.x) + channel;
  T* dx = static_cast<T*>(call.y) + channel;

  double sums[N] = {};
  for (int64_t i = split * length + row; active && i < end; i += height * LOADS) {
    Pack<T, N> packs[LOADS];
    unsigned signs[LOADS];
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
      const int64_t at = (i + k * height) * call.channels;
      const bool inside = i + k * height < end;
      packs[k] = load<T, N>(dy + at, inside);
      signs[k] = inside ? call.bits[(at + channel) / 8] >> (at + channel) % 8 : 0;
    }
    A some[N] = {};
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
      A v[N];
      widen(packs[k], v);
      activate_backward<N>(v, signs[k], leaky);
#pragma unroll
      for (int j = 0; j < N; j++) some[j] += v[j];
      if (i + k * height < end) store<T, N>(dx + (i + k * height) * call.channels, v);
    }
#pragma unroll
    for (int j = 0; j < N; j++) sums[j] += some[j];
  }
  if (call.dbias == nullptr) return;
  __shared__ double all[N][THREADS];
#pragma unroll
  for (int j = 0; j < N; j++) all[j][threadIdx.x] = sums[j];
  __syncthreads();
  if (threadIdx.x < width * N && tile + threadIdx.x < call.channels) {
    double sum = 0;
    for (int i = 0; i < height; i++) sum += all[threadIdx.x % N][i * width + threadIdx.x / N];
    static_cast<double*>(call.workspace)[(tile + threadIdx.x) * splits + split] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS) dbias_kernel(BiasLeakyRelu call, unsigned splits) {
  const double* partial = static_cast<const double*>(call.workspace) + int64_t(blockIdx.x) * splits;
  double sum = 0;
  for (unsigned i = threadIdx.x; i < splits; i += THREADS) sum += partial[i];
  const auto total = static_cast<Wide<T>>(block_sum<THREADS>(sum));
  if (threadIdx.x == 0) store<T, 1>(static_cast<T*>(call.dbias) + blockIdx.x, &total);
}

// Packs of channels per block in NHWC: all of few channels, else the most that divide well; at least 128 bytes.
int tile_width(int64_t packs) {
  if (packs <= WARP) return static_cast<int>(packs);
  return packs % 32 == 0 ? 32 : packs % 16 == 0 ? 16 : 8;
}

// Elements per access that the shape allows in the backward.
int64_t pack_of(const BiasLeakyRelu& call) {
  const int64_t full = 16 / size_of(call.type);
  return (call.inner == 1 ? call.channels : call.inner) % full == 0 ? full : 1;
}

// How many blocks share a channel, each with at least LOADS packs per thread.
int64_t splits_of(const BiasLeakyRelu& call) {
  const int64_t packs = call.channels / pack_of(call);
  int64_t wanted = ceil_divide(BLOCKS, call.channels);
  int64_t most = call.outer * call.inner / pack_of(call) / (THREADS * LOADS);
  if (call.inner == 1) {
    wanted = ceil_divide(BLOCKS, ceil_divide(packs, tile_width(packs)));
    most = call.outer / (THREADS / tile_width(packs) * LOADS);
  }
  return std::max<int64_t>(1, std::min(wanted, most));
}

template <class T, int N>
void launch_backward(const BiasLeakyRelu& call, int64_t splits, cudaStream_t stream) {
  const auto share = [&](int64_t work, int64_t pass) { return ceil_divide(ceil_divide(work, splits), pass) * pass; };
  const Leaky<Wide<T>> leaky(call);
  const auto parts = static_cast<unsigned>(splits);
  if (call.inner == 1) {
    const int width = tile_width(call.channels / N);
    const auto blocks = static_cast<unsigned>(ceil_divide(call.channels, width * N) * splits);
    const auto kernel = backward_channels_last_kernel<T, N>;
    kernel<<<blocks, THREADS, 0, stream>>>(call, leaky, width, parts, share(call.outer, THREADS / width * LOADS));
  } else {
    const auto blocks = static_cast<unsigned>(call.channels * splits);
    const auto kernel = backward_planes_kernel<T, N>;
    kernel<<<blocks, THREADS, 0, stream>>>(call, leaky, parts, share(call.outer * call.inner / N, THREADS * LOADS));
  }
}

}  // namespace

const char* bias_leaky_relu_cuda(const BiasLeakyRelu& call, void* stream) {
  return for_type(call.type, [&](auto zero) {
    using T = decltype(zero);
    constexpr int N = FULL<T>;
    const int64_t numel = call.outer * call.channels * call.inner;
    const void* bias = call.bias;
    const bool per_element = call.inner == 1 && call.channels % N == 0 && aligned({bias});
    const bool packed = numel % N == 0 && aligned({call.x, call.y}) && (!bias || call.inner >= N || per_element);
    const auto kernel = !packed ? forward_kernel<T, 1, false>
                        : per_element ? forward_kernel<T, N, true>
                                      : forward_kernel<T, N, false>;
    const auto blocks = static_cast<unsigned>(ceil_divide(numel, THREADS * LOADS * (packed ? N : 1)));
    const Divisor inner(std::min(call.inner, int64_t(1) << 30)), channels(call.channels);
    const Leaky<Wide<T>> leaky(call);
    kernel<<<blocks, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(call, leaky, inner, channels);
    return launched();
  });
}

int64_t bias_leaky_relu_cuda_workspace(const BiasLeakyRelu& call) {
  return call.channels * splits_of(call) * int64_t(sizeof(double));
}

const char* bias_leaky_relu_backward_cuda(const BiasLeakyRelu& call, void* stream) {
  return for_type(call.type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t splits = splits_of(call);
    if (pack_of(call) == FULL<T> && aligned({call.x, call.y}))
      launch_backward<T, FULL<T>>(call, splits, static_cast<cudaStream_t>(stream));
    else
      launch_backward<T, 1>(call, splits, static_cast<cudaStream_t>(stream));
    const char* error = launched();
    if (error != nullptr || call.dbias == nullptr) return error;
    const auto kernel = dbias_kernel<T>;
    const auto channels = static_cast<unsigned>(call.channels);
    kernel<<<channels, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(call, static_cast<unsigned>(splits));
    return launched();
  });
}

}  // namespace gan_ops
