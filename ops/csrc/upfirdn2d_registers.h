// upfirdn2d in registers, with AVX-512: sums over rows stay in a register until the sum along the row takes them, so
// nothing but outputs is ever written. Two families: planes at most 16 wide, where a row is one register, and any size
// with the filter of the networks: four weights a, b, b, a per axis, nothing inserted, strides one or two.
#pragma once
#include "upfirdn2d_plan.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define REGISTERS
namespace gan_ops {

constexpr int64_t SIXTEEN = 16;

// Planes at most 16 wide: a row is one register. The vertical sum keeps the rows it needs in registers, and the
// horizontal one is a few permutations of its result, weighted lane by lane: no line, and no loop along the row.
constexpr int SMALL_TAPS = 4;

inline bool is_small(const Plan<float>& plan) {
  const Upfirdn2d& call = plan.call;
  return !call.channels_last && call.separable && call.horizontal.in <= SIXTEEN && call.horizontal.out <= 2 * SIXTEEN &&
         plan.vertical.taps <= SMALL_TAPS && plan.horizontal.taps <= SMALL_TAPS;
}

struct Lanes {  // one tap of sixteen outputs: which lane of the inputs, if any, with what weight
  __m512i index;
  __mmask16 inside;
  __m512 weight;

  Lanes(const Plan<float>& plan, int64_t begin, int tap) {
    alignas(64) int32_t from[SIXTEEN] = {};
    alignas(64) float weights[SIXTEEN] = {};
    inside = 0;
    for (int64_t o = begin; o < std::min(begin + SIXTEEN, plan.call.horizontal.out); o++) {
      const int64_t x = plan.horizontal.first(o) + tap;
      if (tap >= plan.taps) continue;
      weights[o - begin] = plan.column_weights[plan.horizontal.phase(o) * plan.taps + tap];
      if (x < 0 || x >= plan.call.horizontal.in) continue;
      from[o - begin] = x;
      inside |= 1 << (o - begin);
    }
    index = _mm512_load_si512(from);
    weight = _mm512_load_ps(weights);
  }
};

// The sum of four terms weighted a, b, b, a: additions, which other units do at the same time, save half the products.
inline __m512 mirrored(const __m512* weights, __m512 t0, __m512 t1, __m512 t2, __m512 t3) {
  return _mm512_fmadd_ps(weights[1], _mm512_add_ps(t1, t2), _mm512_mul_ps(weights[0], _mm512_add_ps(t0, t3)));
}

template <bool SYMMETRIC, int TAPS, class Term>
inline __m512 weighted(const __m512 (&weights)[TAPS], const Term& term) {
  if constexpr (SYMMETRIC) return mirrored(weights, term(0), term(1), term(2), term(3));
  __m512 sum = _mm512_mul_ps(weights[0], term(0));
  for (int k = 1; k < TAPS; k++) sum = _mm512_fmadd_ps(weights[k], term(k), sum);
  return sum;
}

// STEP: how far the rows move from output to output; 0: not the same everywhere. A tap that the filter does not have
// reads zeros. SYMMETRIC: all outputs have the same four weights, a, b, b, a.
template <int TAPS, int STEP, int OUTS, bool SYMMETRIC, bool ACTIVATED>
void run_small(const Plan<float>& plan) {
  const Upfirdn2d& call = plan.call;
  std::vector<float> weights(plan.vertical.phases * TAPS);
  for (int phase = 0; phase < plan.vertical.phases; phase++)
    std::copy_n(plan.row_weights.data() + phase * plan.vertical.taps, plan.vertical.taps, weights.data() + phase * TAPS);
  const int64_t grain = std::max<int64_t>(1, GRAIN / (call.vertical.out * call.horizontal.out));
  at::parallel_for(0, call.n * call.c, grain, [&](int64_t plane, int64_t end) {
    // Here and below inside the function that writes bits: for all the compiler knows, they are written over what is not.
    const int64_t height = call.vertical.in, width = call.horizontal.in;
    const int64_t out_height = call.vertical.out, out_width = call.horizontal.out;
    const auto row_mask = static_cast<__mmask16>((1 << width) - 1);
    __m512i index[OUTS][TAPS];
    __mmask16 inside[OUTS][TAPS];
    __m512 weight[OUTS][TAPS];
    for (int v = 0; v < OUTS; v++)
      for (int k = 0; k < TAPS; k++) {
        const Lanes lanes(plan, v * SIXTEEN, k);
        index[v][k] = lanes.index, inside[v][k] = lanes.inside, weight[v][k] = lanes.weight;
      }
    __m512 first_weights[TAPS];
    for (int k = 0; k < TAPS; k++) first_weights[k] = _mm512_set1_ps(weights[k]);
    for (; plane < end; plane++) {
      const float* x = static_cast<const float*>(call.x) + plane * height * width;
      const auto row = [&](int64_t i) {
        return _mm512_maskz_loadu_ps(i >= 0 && i < height ? row_mask : 0, x + i * width);
      };
      const auto shift = as<V16<float>>(_mm512_set1_ps(plan.bias[plane % call.c]));
      Destination<float, ACTIVATED> out(call, false, plane * out_height * out_width);
      __m512 rows[TAPS];
      for (int k = STEP; k < TAPS && STEP; k++) rows[k] = row(plan.vertical.first(0) - STEP + k);
      const auto output = [&](const auto& by) {
        const __m512 sum = weighted<SYMMETRIC, TAPS>(by, [&](int k) { return rows[k]; });
        for (int v = 0; v < OUTS; v++) {
          const auto term = [&](int k) { return _mm512_maskz_permutexvar_ps(inside[v][k], index[v][k], sum); };
          out.put(v * SIXTEEN, as<V16<float>>(weighted<SYMMETRIC, TAPS>(weight[v], term)), shift, out_width - v * SIXTEEN);
        }
        out.next(out_width);
      };
      if constexpr (STEP > 0) {
        int64_t next = plan.vertical.first(0) + TAPS - STEP;
#pragma GCC unroll 4
        for (int64_t r = 0; r < out_height; r++, next += STEP) {
          for (int k = 0; k + STEP < TAPS; k++) rows[k] = rows[k + STEP];
          for (int k = 0; k < STEP; k++) rows[TAPS - STEP + k] = row(next + k);
          output(first_weights);
        }
      } else {
        for (int64_t r = 0; r < out_height; r++) {
          for (int k = 0; k < TAPS; k++) rows[k] = row(plan.vertical.first(r) + k);
          __m512 by[TAPS];
          for (int k = 0; k < TAPS; k++) by[k] = _mm512_set1_ps(weights[plan.vertical.phase(r) * TAPS + k]);
          output(by);
        }
      }
    }
  });
}

inline bool is_symmetric(const std::vector<float>& weights) {  // of the one phase of an axis
  return weights.size() == 4 && weights[0] == weights[3] && weights[1] == weights[2];
}

template <bool ACTIVATED>
void run_small(const Plan<float>& plan) {
  const auto run = [&](auto taps, auto outs) {
    const int stride = plan.vertical.phases > 1 ? 0 : plan.vertical.stride;
    constexpr bool four = taps() == 4 && outs() == 1;
    const bool symmetric = is_symmetric(plan.row_weights) && is_symmetric(plan.column_weights);
    if (stride == 1 && four && symmetric) run_small<taps(), 1, outs(), four, ACTIVATED>(plan);
    else if (stride == 1) run_small<taps(), 1, outs(), false, ACTIVATED>(plan);
    else if (stride == 2 && four && symmetric) run_small<taps(), 2, outs(), four, ACTIVATED>(plan);
    else if (stride == 2) run_small<taps(), 2, outs(), false, ACTIVATED>(plan);
    else run_small<taps(), 0, outs(), false, ACTIVATED>(plan);
  };
  const bool wide = plan.call.horizontal.out > SIXTEEN, few = std::max(plan.vertical.taps, plan.horizontal.taps) <= 2;
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  using Four = std::integral_constant<int, 4>;
  if (few) wide ? run(Two(), Two()) : run(Two(), One());
  else wide ? run(Four(), Two()) : run(Four(), One());
}

// The filter of the networks, with anything between a blur and a down by two.
template <class T>
bool is_mirrored(const Plan<T>& plan) {
  const int stride = plan.vertical.stride;
  return plan.call.separable && plan.vertical.phases == 1 && plan.horizontal.phases == 1 && (stride == 1 || stride == 2) &&
         plan.horizontal.stride == stride && is_symmetric(plan.row_weights) && is_symmetric(plan.column_weights) &&
         (!plan.call.channels_last || plan.call.c % SIXTEEN == 0);
}

// Lanes BY, BY + 1, ..., of low and then of high.
template <int BY>
inline __m512 shifted(__m512 low, __m512 high) {
  return as<__m512>(_mm512_alignr_epi32(as<__m512i>(high), as<__m512i>(low), BY));
}

// Thirty-two neighbors: those at even places to `low`, at odd places to `high`.
inline void split_pairs(__m512& low, __m512& high) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512 both = low;
  low = _mm512_permutex2var_ps(both, even, high);
  high = _mm512_permutex2var_ps(both, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high);
}

// Sixteen numbers of which those not in `which` are zeros that are not read.
inline __m512 load16(const float* p, __mmask16 which = 0xffff) { return _mm512_maskz_loadu_ps(which, p); }
inline __m512 load16(const c10::BFloat16* p, __mmask16 which = 0xffff) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(which, p)), 16));
}
inline __m512 load16(const c10::Half* p, __mmask16 which = 0xffff) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(which, p));
}

struct MirroredWeights {
  __m512 row[2], column[2];

  template <class T>
  explicit MirroredWeights(const Plan<T>& plan) {
    for (int k = 0; k < 2; k++) row[k] = _mm512_set1_ps(plan.row_weights[k]), column[k] = _mm512_set1_ps(plan.column_weights[k]);
  }
};

// NHWC: for each sixteen channels, a walk along a row, on which an output is made of the sums over rows of four pixels.
// Tiles are narrow, so that the four rows of one stay in the first-level cache until the next rows have been made.
template <class T, int STEP, bool ACTIVATED>
void run_mirrored_nhwc(const Plan<T>& plan, bool streams) {
  const Upfirdn2d& call = plan.call;
  const int64_t tile = std::clamp<int64_t>(1024 / call.c, 8, 32), tiles = (call.horizontal.out + tile - 1) / tile;
  const int64_t grain = std::max<int64_t>(1, GRAIN / (tile * call.c));
  at::parallel_for(0, call.n * tiles * call.vertical.out, grain, [&](int64_t unit, int64_t units) {
    const int64_t height = call.vertical.in, width = call.horizontal.in, channels = call.c;
    const int64_t out_height = call.vertical.out, out_width = call.horizontal.out;
    const MirroredWeights weights(plan);
    const Zeros<T> zeros(width * channels);
    for (; unit < units; unit++) {
      const int64_t r = unit % out_height, left = unit / out_height % tiles * tile, image = unit / out_height / tiles;
      const int64_t size = std::min(tile, out_width - left), first = plan.horizontal.first(left);
      // Outputs of the tile from `begin` to `end` add no pixel that is left or right of the image.
      const int64_t begin = std::clamp<int64_t>((2 * STEP - 5 - first) / STEP, 0, size);
      const int64_t end = std::clamp<int64_t>((width - first + STEP - 4) / STEP, begin, size);
      const Rows<T> rows{static_cast<const T*>(call.x) + image * height * width * channels, zeros.data(), height, width * channels};
      const T* from[4];
      for (int k = 0; k < 4; k++) from[k] = rows[plan.vertical.first(r) + k];
      const Destination<T, ACTIVATED> out(call, streams, ((image * out_height + r) * out_width + left) * channels);
      for (int64_t c = 0; c < channels; c += SIXTEEN) {
        const __m512 bias = _mm512_loadu_ps(plan.bias.data() + c);
        const auto sum = [&](int64_t x) {
          const int64_t at = x * channels + c;
          if (STEP == 1) _mm_prefetch(from[3] + at + width * channels, _MM_HINT_T0);  // what the next row of outputs adds
          return mirrored(weights.row, load16(from[0] + at), load16(from[1] + at), load16(from[2] + at), load16(from[3] + at));
        };
        const auto checked = [&](int64_t x) { return x >= 0 && x < width ? sum(x) : _mm512_setzero_ps(); };
        __m512 sums[4];
        for (int k = STEP; k < 4; k++) sums[k] = checked(first + k - STEP);
        const auto walk = [&](int64_t o, int64_t end, const auto& pixel) {
          for (; o < end; o++) {
            for (int k = 0; k + STEP < 4; k++) sums[k] = sums[k + STEP];
            for (int k = 4 - STEP; k < 4; k++) sums[k] = pixel(first + o * STEP + k);
            out.put(o * channels + c, as<V16<float>>(mirrored(weights.column, sums[0], sums[1], sums[2], sums[3])),
                    as<V16<float>>(bias));
          }
        };
        walk(0, begin, checked);
        walk(begin, end, sum);
        walk(end, size, checked);
      }
    }
    fence();
  });
}

// NCHW: sums over rows of sixteen columns, for ROWS rows of outputs at a time, which share rows of inputs; an output takes
// the last sums and those before them, shifted into each other.
template <class T, int STEP, bool ACTIVATED, int ROWS = 4 / STEP>
void run_mirrored_nchw(const Plan<T>& plan, bool streams) {
  constexpr int LOADS = ROWS * STEP + 4 - STEP;
  const Upfirdn2d& call = plan.call;
  const int64_t groups = (call.vertical.out + ROWS - 1) / ROWS;
  const int64_t grain = std::max<int64_t>(1, GRAIN / (ROWS * call.horizontal.out));
  at::parallel_for(0, call.n * call.c * groups, grain, [&](int64_t unit, int64_t units) {
    const int64_t height = call.vertical.in, width = call.horizontal.in, left = plan.horizontal.first(0);
    const int64_t out_height = call.vertical.out, out_width = call.horizontal.out;
    const MirroredWeights weights(plan);
    const Zeros<T> zeros(width);
    for (; unit < units; unit++) {
      const int64_t plane = unit / groups, begin = unit % groups * ROWS;
      const int rows_left = static_cast<int>(std::min<int64_t>(ROWS, out_height - begin));
      const Rows<T> rows{static_cast<const T*>(call.x) + plane * height * width, zeros.data(), height, width};
      const T* from[LOADS];
      for (int k = 0; k < LOADS; k++) from[k] = rows[plan.vertical.first(begin) + k];
      const V16<float> bias = as<V16<float>>(_mm512_set1_ps(plan.bias[plane % call.c]));
      const Destination<T, ACTIVATED> out(call, streams, (plane * out_height + begin) * out_width);

      // The sums over rows of the sixteen columns from x on.
      const auto sum = [&](int64_t x, __m512 (&sums)[ROWS]) {
        __m512 loaded[LOADS];
        if (x >= 0 && x + SIXTEEN <= width) {
          for (int k = 0; k < LOADS; k++) loaded[k] = load16(from[k] + x);
        } else {
          const auto before = [](int64_t n) { return (1u << std::clamp<int64_t>(n, 0, SIXTEEN)) - 1; };
          const auto inside = static_cast<__mmask16>(before(width - x) & ~before(-x));
          for (int k = 0; k < LOADS; k++) loaded[k] = load16(from[k] + x, inside);
        }
        for (int q = 0; q < ROWS; q++) {
          const __m512* const four = loaded + q * STEP;
          sums[q] = mirrored(weights.row, four[0], four[1], four[2], four[3]);
        }
      };
      const auto put = [&](int64_t o, int q, __m512 sum) {
        if (q < rows_left) out.put(q * out_width + o, as<V16<float>>(sum), bias, out_width - o);
      };

      if constexpr (STEP == 1) {
        __m512 now[ROWS], next[ROWS];
        sum(left, now);
        for (int64_t o = 0; o < out_width; o += SIXTEEN) {
          sum(left + o + SIXTEEN, next);
#pragma GCC unroll 4  // or they would be kept in memory
          for (int q = 0; q < ROWS; q++) {
            put(o, q, mirrored(weights.column, now[q], shifted<1>(now[q], next[q]), shifted<2>(now[q], next[q]), shifted<3>(now[q], next[q])));
            now[q] = next[q];
          }
        }
      } else {
        __m512 even[ROWS], odd[ROWS], next_even[ROWS], next_odd[ROWS];
        const auto split = [&](int64_t x, __m512 (&evens)[ROWS], __m512 (&odds)[ROWS]) {
          sum(x, evens), sum(x + SIXTEEN, odds);
          for (int q = 0; q < ROWS; q++) split_pairs(evens[q], odds[q]);
        };
        split(left, even, odd);
        for (int64_t o = 0; o < out_width; o += SIXTEEN) {
          split(left + 2 * (o + SIXTEEN), next_even, next_odd);
#pragma GCC unroll 4
          for (int q = 0; q < ROWS; q++) {
            put(o, q, mirrored(weights.column, even[q], odd[q], shifted<1>(even[q], next_even[q]), shifted<1>(odd[q], next_odd[q])));
            even[q] = next_even[q], odd[q] = next_odd[q];
          }
        }
      }
    }
    fence();
  });
}

template <class T, bool ACTIVATED>
void run_mirrored(const Plan<T>& plan, bool streams) {
  const bool blur = plan.vertical.stride == 1;
  if (plan.call.channels_last) {
    blur ? run_mirrored_nhwc<T, 1, ACTIVATED>(plan, streams) : run_mirrored_nhwc<T, 2, ACTIVATED>(plan, streams);
  } else {
    blur ? run_mirrored_nchw<T, 1, ACTIVATED>(plan, streams) : run_mirrored_nchw<T, 2, ACTIVATED>(plan, streams);
  }
}

}  // namespace gan_ops
#endif
