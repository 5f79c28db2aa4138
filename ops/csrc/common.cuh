// What the kernels share: 16-byte packs, numbers widened for arithmetic, block sums.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "common.h"

namespace gan_ops {

constexpr int WARP = 32;

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
constexpr int FULL = 16 / sizeof(T);  // elements per 16-byte access

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T value[N];
};

template <class To, class From>
__device__ __forceinline__ To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

// A bfloat16 is the upper half of a float: out of a pair, a shift and a mask, one instruction less than by itself.
template <class T, int N>
__device__ __forceinline__ void widen(const Pack<T, N>& pack, Wide<T>* out) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && N % 2 == 0) {
    const auto pairs = bit_cast<Pack<uint32_t, N / 2>>(pack);
#pragma unroll
    for (int i = 0; i < N; i++) {
      const uint32_t pair = pairs.value[i / 2];
      out[i] = __uint_as_float(i % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) out[i] = widen(pack.value[i]);
  }
}

// To nearest even; 16-bit types in pairs, for which there is one instruction.
template <class T, int N>
__device__ __forceinline__ Pack<T, N> narrow(const Wide<T>* in) {
  Pack<T, N> pack;
  if constexpr (sizeof(T) > 2) {
#pragma unroll
    for (int i = 0; i < N; i++) pack.value[i] = in[i];
  } else if constexpr (N == 1) {
    if constexpr (std::is_same_v<T, __half>) pack.value[0] = __float2half_rn(in[0]);
    else pack.value[0] = __float2bfloat16_rn(in[0]);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162> pair;
      if constexpr (std::is_same_v<T, __half>) pair = __floats2half2_rn(in[i], in[i + 1]);
      else pair = __floats2bfloat162_rn(in[i], in[i + 1]);
      pack.value[i] = pair.x;
      pack.value[i + 1] = pair.y;
    }
  }
  return pack;
}

// The compiler splits some 16-byte accesses to packs into narrow ones, but never these. What is read here must not be
// written by the same kernel.
__device__ __forceinline__ uint4 load_16(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

__device__ __forceinline__ void store_16(void* address, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" : : "l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w));
}

// Zeros where there is nothing to read.
template <class T, int N>
__device__ __forceinline__ Pack<T, N> load(const T* address, bool inside) {
  if constexpr (sizeof(T) * N == 16) return bit_cast<Pack<T, N>>(inside ? load_16(address) : uint4{});
  else return inside ? *reinterpret_cast<const Pack<T, N>*>(address) : Pack<T, N>{};
}

template <class T, int N>
__device__ __forceinline__ void store(T* address, const Wide<T>* in) {
  const Pack<T, N> pack = narrow<T, N>(in);
  if constexpr (sizeof(pack) == 16) store_16(address, bit_cast<uint4>(pack));
  else *reinterpret_cast<Pack<T, N>*>(address) = pack;
}

// The sum over a block of THREADS threads, always in the same order; thread 0 gets it.
template <int THREADS>
__device__ __forceinline__ double block_sum(double sum) {
  __shared__ double warps[THREADS / WARP];
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) sum += __shfl_down_sync(~0u, sum, distance);
  if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = sum;
  __syncthreads();
  sum = 0;
  if (threadIdx.x == 0)
    for (int i = 0; i < THREADS / WARP; i++) sum += warps[i];
  return sum;
}

// Quotients of 0 <= n < 2^31 by a multiplication: a division in hardware takes some twenty instructions.
struct Divisor {
  uint32_t divisor, multiplier, shift;

  explicit Divisor(int64_t d) : divisor(static_cast<uint32_t>(d)), shift(0) {
    while ((int64_t(1) << shift) < d) shift++;
    multiplier = static_cast<uint32_t>((((uint64_t(1) << shift) - divisor) << 32) / divisor + 1);
  }
  // Splits n into quotient (returned) and remainder (left in n).
  __device__ __forceinline__ int split(int& n) const {
    const uint32_t quotient = (__umulhi(n, multiplier) + n) >> shift;
    n -= quotient * divisor;
    return quotient;
  }
};

// ---- Host ----

inline int64_t ceil_divide(int64_t n, int64_t d) { return (n + d - 1) / d; }

inline bool aligned(std::initializer_list<const void*> addresses) {
  uintptr_t all = 0;
  for (const void* address : addresses) all |= reinterpret_cast<uintptr_t>(address);
  return all % 16 == 0;
}

inline int64_t size_of(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }

// Calls body with a value of the C++ type.
template <class Body>
const char* for_type(Type type, const Body& body) {
  switch (type) {
    case Type::f64: return body(double());
    case Type::f32: return body(float());
    case Type::bf16: return body(__nv_bfloat16());
    case Type::f16: return body(__half());
  }
  return "gan_ops: no such type";
}

inline const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace gan_ops
