// upfirdn2d in registers, with AVX-512: sums over rows stay in a register until the sum along the row takes them, so
// nothing but outputs is ever written. Here what such kernels share, and planes at most 16 wide, where a row is one
// register; upfirdn2d_mirrored.h has the filter of the networks for planes of any size.
#pragma once
#include "upfirdn2d_plan.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define REGISTERS
namespace gan_ops {

constexpr int64_t SIXTEEN = 16;

// Sixteen numbers of which those not in `which` are zeros that are not read.
inline __m512 load16(const float* p, __mmask16 which = 0xffff) { return _mm512_maskz_loadu_ps(which, p); }
inline __m512 load16(const c10::BFloat16* p, __mmask16 which = 0xffff) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(which, p)), 16));
}
inline __m512 load16(const c10::Half* p, __mmask16 which = 0xffff) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(which, p));
}

// Where sixteen outputs at a time go.
template <class T>
struct Sixteens {
  Writer<T> writer;

  ALWAYS_INLINE void put(int64_t i, __m512 v) const { writer.put(i, as<V16<float>>(v)); }

  // The first n, or all sixteen.
  ALWAYS_INLINE void put(int64_t i, __m512 v, int64_t n) const {
    if (n >= SIXTEEN) return put(i, v);
    if constexpr (std::is_same_v<T, float>) {
      _mm512_mask_storeu_ps(writer.y + i, static_cast<__mmask16>((1 << n) - 1), v);
    } else {
      const auto all = as<V16<float>>(v);
      writer.put(i, low_half<float>(all), n);
      if (n > LANES) writer.put(i + LANES, high_half<float>(all), n - LANES);
    }
  }
};

// Planes at most 16 wide: a row is one register. The vertical sum keeps the rows it needs in registers, and the
// horizontal one is a few permutations of its result, weighted lane by lane: no line, and no loop along the row.
constexpr int SMALL_TAPS = 4;

inline bool is_small(const Plan<float>& plan) {
  const Upfirdn2d& call = plan.call;
  return !call.channels_last && call.separable && call.horizontal.in <= SIXTEEN &&
         call.horizontal.out <= 2 * SIXTEEN && plan.vertical.taps <= SMALL_TAPS && plan.horizontal.taps <= SMALL_TAPS;
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
ALWAYS_INLINE __m512 mirrored(const __m512* weights, __m512 t0, __m512 t1, __m512 t2, __m512 t3) {
  return _mm512_fmadd_ps(weights[1], _mm512_add_ps(t1, t2), _mm512_mul_ps(weights[0], _mm512_add_ps(t0, t3)));
}

template <bool SYMMETRIC, int TAPS, class Term>
ALWAYS_INLINE __m512 weighted(const __m512 (&weights)[TAPS], const Term& term) {
  if constexpr (SYMMETRIC) return mirrored(weights, term(0), term(1), term(2), term(3));
  __m512 sum = _mm512_mul_ps(weights[0], term(0));
  for (int k = 1; k < TAPS; k++) sum = _mm512_fmadd_ps(weights[k], term(k), sum);
  return sum;
}

// STEP: how far the rows move from output to output; 0: not the same everywhere. A tap that the filter does not have
// reads zeros. SYMMETRIC: all outputs have the same four weights, a, b, b, a.
template <int TAPS, int STEP, int OUTS, bool SYMMETRIC>
void run_small(const Plan<float>& plan) {
  const Upfirdn2d& call = plan.call;
  std::vector<float> weights(plan.vertical.phases * TAPS);
  for (int phase = 0; phase < plan.vertical.phases; phase++)
    for (int k = 0; k < plan.vertical.taps; k++)
      weights[phase * TAPS + k] = plan.row_weights[phase * plan.vertical.taps + k];
  const int64_t grain = std::max<int64_t>(1, GRAIN / (call.vertical.out * call.horizontal.out));
  at::parallel_for(0, call.n * call.c, grain, [&](int64_t plane, int64_t end) {
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
      Sixteens<float> out{plan.writer(plane * out_height * out_width, false)};
      __m512 rows[TAPS];
      for (int k = STEP; k < TAPS && STEP; k++) rows[k] = row(plan.vertical.first(0) - STEP + k);
      const auto output = [&](const auto& by) {
        const __m512 sum = weighted<SYMMETRIC>(by, [&](int k) { return rows[k]; });
        for (int v = 0; v < OUTS; v++) {
          const auto term = [&](int k) { return _mm512_maskz_permutexvar_ps(inside[v][k], index[v][k], sum); };
          out.put(v * SIXTEEN, weighted<SYMMETRIC>(weight[v], term), out_width - v * SIXTEEN);
        }
        out.writer.y += out_width;
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

inline void run_small(const Plan<float>& plan) {
  const auto run = [&](auto taps, auto outs) {
    const int stride = plan.vertical.phases > 1 ? 0 : plan.vertical.stride;
    constexpr bool four = taps() == 4 && outs() == 1;
    const bool symmetric = is_symmetric(plan.row_weights) && is_symmetric(plan.column_weights);
    if (stride == 1 && four && symmetric) run_small<taps(), 1, outs(), four>(plan);
    else if (stride == 1) run_small<taps(), 1, outs(), false>(plan);
    else if (stride == 2 && four && symmetric) run_small<taps(), 2, outs(), four>(plan);
    else if (stride == 2) run_small<taps(), 2, outs(), false>(plan);
    else run_small<taps(), 0, outs(), false>(plan);
  };
  const bool wide = plan.call.horizontal.out > SIXTEEN, few = std::max(plan.vertical.taps, plan.horizontal.taps) <= 2;
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  using Four = std::integral_constant<int, 4>;
  if (few) wide ? run(Two(), Two()) : run(Two(), One());
  else wide ? run(Four(), Two()) : run(Four(), One());
}

}  // namespace gan_ops
#endif
