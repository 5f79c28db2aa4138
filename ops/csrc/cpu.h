// CPU side: eight numbers at a time. GCC's and Clang's vector extensions compile to what the machine has (one AVX
// register, two of NEON's), and eight elements are one byte of sign bits.
#pragma once
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "common.h"

namespace gan_ops {

constexpr int LANES = 8;

// For what stands in the innermost loops: a call there would send every register to memory and back.
#define ALWAYS_INLINE inline __attribute__((always_inline))

template <class Number, int N = LANES>
struct Vector {
  typedef Number type __attribute__((vector_size(N * sizeof(Number))));
};
template <class A>
using V = typename Vector<A>::type;
using Bits16 = Vector<uint16_t>::type;
using Bits32 = Vector<uint32_t>::type;

// What sums are taken in: double for double, else float.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class To, class From>
inline To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class A>
inline V<A> splat(A a) {
  return V<A>{a, a, a, a, a, a, a, a};
}

// Sixteen numbers: one register where there is such a one.
template <class A>
using V16 = typename Vector<A, 2 * LANES>::type;

template <class A>
inline V16<A> join(V<A> low, V<A> high) {
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
template <class A>
inline V<A> low_half(const V16<A>& v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
}
template <class A>
inline V<A> high_half(const V16<A>& v) {
  return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
}

template <class T>
inline V<Accumulator<T>> load(const T* p) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    Bits16 bits;
    std::memcpy(&bits, p, sizeof(bits));
    return as<V<float>>(__builtin_convertvector(bits, Bits32) << 16);
  } else if constexpr (std::is_same_v<T, c10::Half>) {
#if defined(__F16C__)
    return as<V<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    V<float> v;
    for (int i = 0; i < LANES; i++) v[i] = p[i];
    return v;
#endif
  } else {
    V<T> v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
}

// Sixteen.
template <class T>
inline V16<Accumulator<T>> load_two(const T* p) {
  if constexpr (std::is_same_v<T, Accumulator<T>>) {
    V16<T> v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  } else {
    return join<Accumulator<T>>(load(p), load(p + LANES));
  }
}

// The first n of eight, zeros behind them: a row's end must not be read past.
template <class T>
inline V<Accumulator<T>> load(const T* p, int64_t n) {
  if (n >= LANES) return load(p);
  V<Accumulator<T>> v = {};
  for (int64_t i = 0; i < n; i++) v[i] = static_cast<Accumulator<T>>(p[i]);
  return v;
}

// Eight numbers as they lie in memory; bf16 and f16 are rounded to nearest, ties to even, and NaN stays NaN.
template <class T>
inline auto packed(V<Accumulator<T>> v) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const auto bits = as<Bits32>(v);
    const auto rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector((v == v) ? rounded : (Bits32{} + 0x7fc0), Bits16);
  } else if constexpr (std::is_same_v<T, c10::Half>) {
#if defined(__F16C__)
    return as<Bits16>(_mm256_cvtps_ph(as<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
    Bits16 bits;
    for (int i = 0; i < LANES; i++) bits[i] = c10::Half(v[i]).x;
    return bits;
#endif
  } else {
    return v;
  }
}

template <class T>
inline void store(T* p, V<Accumulator<T>> v) {
  const auto bits = packed<T>(v);
  std::memcpy(p, &bits, sizeof(bits));
}

template <class T>
inline void store(T* p, V<Accumulator<T>> v, int64_t n) {
  if (n >= LANES) return store(p, v);
  for (int64_t i = 0; i < n; i++) p[i] = static_cast<T>(v[i]);
}

// Past the cache: a line that nobody will read soon need not be fetched before it is overwritten. p must be aligned to
// its 8 * sizeof(T) bytes; `fence()` before another thread reads.
template <class T>
inline void stream(T* p, V<Accumulator<T>> v) {
#if defined(__AVX__)
  if constexpr (sizeof(T) == 4) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), as<__m256i>(packed<T>(v)));
  if constexpr (sizeof(T) == 2) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), as<__m128i>(packed<T>(v)));
#endif
  store(p, v);
}

inline void fence() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

constexpr int64_t STREAM_BYTES = 16 << 20;  // an output above this leaves the cache before it is read

// Zeros that begin on a cache line, and room for one vector behind them.
template <class Number>
class Zeros {
 public:
  explicit Zeros(int64_t size) : numbers_(size + LANES + LINE, Number(0)) {
    const auto address = reinterpret_cast<uintptr_t>(numbers_.data());
    begin_ = reinterpret_cast<Number*>((address + 63) / 64 * 64);
  }
  Number* data() const { return begin_; }

 private:
  static constexpr int64_t LINE = 64 / sizeof(Number);
  std::vector<Number> numbers_;
  Number* begin_;
};

// Where outputs go. `streams`: past the cache, which wants elements at multiples of eight to be aligned.
template <class T>
struct Writer {
  using A = Accumulator<T>;
  T* y;
  bool streams;

  // n of the eight, to y[i], y[i + 1], ...
  ALWAYS_INLINE void put(int64_t i, V<A> v, int64_t n = LANES) const {
    if (n < LANES) store(y + i, v, n);
    else if (streams) stream(y + i, v);
    else store(y + i, v);
  }

  // Sixteen: a whole line of float, where the machine has a register for it.
  ALWAYS_INLINE void put(int64_t i, const V16<A>& v) const {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, float>) {
      if (!streams) return _mm512_storeu_ps(y + i, as<__m512>(v));
      if (reinterpret_cast<uintptr_t>(y + i) % 64 == 0) return _mm512_stream_ps(y + i, as<__m512>(v));
    }
#endif
    put(i, low_half<A>(v));
    put(i + LANES, high_half<A>(v));
  }
};

template <class Body>
void dispatch(Type type, const Body& body) {
  switch (type) {
    case Type::f64: return body(double());
    case Type::f32: return body(float());
    case Type::bf16: return body(c10::BFloat16());
    case Type::f16: return body(c10::Half());
  }
}

}  // namespace gan_ops
