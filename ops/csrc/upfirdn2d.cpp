// upfirdn2d on the CPU. An output pixel is a sum over at most ceil(taps / up) inputs per axis, with weights that repeat:
// the polyphase form, in which no inserted zero is ever multiplied.
//
// Separable filters take one pass: the rows that an output row needs are summed into a line that stays in the cache, and
// the line is filtered along the row. Full filters copy rows into lines and sum over all taps along the row. Lines have
// zero margins, so that no loop asks where an image ends. NCHW reads eight neighbors of a line at a time; where the
// stride is not one, a line is split by column modulo the stride. NHWC reads eight channels of a pixel.
#include "upfirdn2d.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <vector>

#include "bias_leaky_relu.h"
#include "binding.h"
#include "cpu.h"
#include "polyphase.h"

namespace gan_ops {
namespace {

constexpr int64_t SCRATCH_BYTES = 8 << 10;  // lines in flight: inputs and outputs want the first-level cache too
constexpr int64_t TILE_BYTES = 32 << 10;    // one line of pixels
constexpr int64_t GRAIN = 32 << 10;         // outputs that are worth a thread

// Rows of inputs, where those outside the image are zeros.
template <class T>
struct Rows {
  const T *image, *zeros;
  int64_t height, pitch;

  const T* operator[](int64_t i) const { return i >= 0 && i < height ? image + i * pitch : zeros; }
};

template <class T>
struct Plan {
  using A = Accumulator<T>;
  const Upfirdn2d& call;
  Polyphase vertical, horizontal;
  std::vector<A> row_weights;         // separable: [vertical phases][vertical taps]
  std::vector<A> column_weights;      // [vertical phases, or 1 if separable][horizontal phases][taps along the row]
  int taps;                           // along the row: horizontal taps, times vertical ones if not separable
  std::vector<int64_t> line_first;    // of each line: the first of the rows that it is a sum of,
  std::vector<const A*> line_weight;  // and their weights
  std::vector<A> bias;                // [c], zeros where there is none

  explicit Plan(const Upfirdn2d& c) : call(c), vertical(c.vertical), horizontal(c.horizontal) {
    using F = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const F* filter = static_cast<const F*>(c.filter);
    const auto at = [&](int64_t tap, int64_t count) { return c.flip ? tap : count - 1 - tap; };
    const auto height = c.vertical.taps, width = c.horizontal.taps;
    if (c.separable) {
      taps = horizontal.taps;
      row_weights = phase_weights<A>(vertical, [&](int64_t i) { return c.gain * filter[at(i, height)]; });
      column_weights = phase_weights<A>(horizontal, [&](int64_t j) { return filter[at(j, width)]; });
    } else {
      taps = vertical.taps * horizontal.taps;
      for (int p = 0; p < vertical.phases; p++)
        for (int q = 0; q < horizontal.phases; q++)
          for (int k = 0; k < vertical.taps; k++)
            for (int l = 0; l < horizontal.taps; l++) {
              const int64_t i = vertical.tap(p, k), j = horizontal.tap(q, l);
              column_weights.push_back(
                  i < height && j < width ? static_cast<A>(c.gain * filter[at(i, height) * width + at(j, width)]) : A(0));
            }
    }
    for (int64_t l = line_of(0); l < lines(0, c.vertical.out).second; l++) {
      static constexpr A one = 1;
      line_first.push_back(c.separable ? vertical.first(l) : l);
      line_weight.push_back(c.separable ? row_weights.data() + vertical.phase(l) * vertical.taps : &one);
    }
    bias.resize(c.c, A(0));
    if (c.activated && c.activation.bias)
      for (int64_t i = 0; i < c.c; i++) bias[i] = static_cast<const T*>(c.activation.bias)[i];
  }

  const A* along_row(int64_t row) const {
    return column_weights.data() + (call.separable ? 0 : vertical.phase(row) * horizontal.phases * taps);
  }

  // Where the first line of an output row is: lines count outputs if the filter is separable, else inputs.
  int64_t line_of(int64_t row) const { return call.separable ? row : vertical.first(row); }

  // The lines [first, last) that rows [begin, end) of outputs need.
  std::pair<int64_t, int64_t> lines(int64_t begin, int64_t end) const {
    if (call.separable) return {begin, end};
    return {vertical.first(begin), vertical.first(end - 1) + vertical.taps};
  }

  // Makes lines [first, last) by one of the `sum_rows`.
  template <class Sum, class... Shape>
  void sum_lines(const Sum& sum, const Rows<T>& rows, int64_t first, int64_t last, const Shape&... shape) const {
    const int64_t at = first - line_of(0);
    sum(rows, line_first.data() + at, line_weight.data() + at, call.separable ? vertical.taps : 1, last - first, shape...);
  }

  // How many rows of outputs to take at a time, with lines of `bytes` each.
  int64_t rows_at_a_time(int64_t bytes) const {
    return std::clamp<int64_t>(SCRATCH_BYTES / bytes, 1, call.vertical.out);
  }
};

// Calls pick with the number of taps, or the factor, as a constant, 0 standing for "any". -> what it returns.
template <class Pick>
auto with_taps(int taps, const Pick& pick) {
  switch (taps) {
    case 1: return pick(std::integral_constant<int, 1>());
    case 2: return pick(std::integral_constant<int, 2>());
    case 3: return pick(std::integral_constant<int, 3>());
    case 4: return pick(std::integral_constant<int, 4>());
    default: return pick(std::integral_constant<int, 0>());
  }
}

template <class Pick>
auto with_factor(int factor, const Pick& pick) {
  switch (factor) {
    case 1: return pick(std::integral_constant<int, 1>());
    case 2: return pick(std::integral_constant<int, 2>());
    default: return pick(std::integral_constant<int, 0>());
  }
}

// The sum over k of weight[k] * source(k)[x], for eight x at a time. What repeats is held in registers: the compiler may
// not keep it there by itself, since for all it knows the outputs overwrite it. TAPS = 0: any number, held in memory.
template <class T, int TAPS>
class WeightedSum {
  using A = Accumulator<T>;

 public:
  template <class Source>
  WeightedSum(const A* weight, int, const Source& source) {
    for (int k = 0; k < TAPS; k++) sources_[k] = source(k), weights_[k] = splat(weight[k]);
  }
  template <class... Length>
  inline V<A> operator()(int64_t x, Length... length) const {
    V<A> v = weights_[0] * load(sources_[0] + x, length...);
    for (int k = 1; k < TAPS; k++) v += weights_[k] * load(sources_[k] + x, length...);
    return v;
  }

 private:
  const T* sources_[TAPS];
  V<A> weights_[TAPS];
};

template <class T>
class WeightedSum<T, 0> {
  using A = Accumulator<T>;

 public:
  template <class Source>
  WeightedSum(const A* weight, int taps, const Source& source) : weights_(weight, weight + taps) {
    for (int k = 0; k < taps; k++) sources_.push_back(source(k));
  }
  template <class... Length>
  inline V<A> operator()(int64_t x, Length... length) const {
    V<A> v = {};
    for (size_t k = 0; k < weights_.size(); k++) v += weights_[k] * load(sources_[k] + x, length...);
    return v;
  }

 private:
  std::vector<const T*> sources_;
  std::vector<A> weights_;
};

// `count` lines: line[x] = sum over k of weight[k] * rows[first + k][x] for x in [0, width), split by x modulo the
// stride into parts that are `pitch` apart.
template <class T, int TAPS, int STRIDE, class A = Accumulator<T>>
void sum_rows(const Rows<T> rows, const int64_t* first, const A* const* weight, int any, int64_t count, A* line,
              int64_t line_size, int64_t width, int stride, int64_t pitch) {
  const int taps = TAPS ? TAPS : any;
  const auto one = [&](const auto& sum) {
    int64_t x = 0;
    if constexpr (STRIDE == 1) {
      for (; x + LANES <= width; x += LANES) store(line + x, sum(x));
      if (x < width) store(line + x, sum(x, width - x));
    } else if constexpr (STRIDE == 2) {
      const auto split = [&](V<A> a, V<A> b) {
        store(line + x / 2, __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14));
        store(line + pitch + x / 2, __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15));
      };
      for (; x + 2 * LANES <= width; x += 2 * LANES) split(sum(x), sum(x + LANES));
      if (x < width) split(sum(x, width - x), x + LANES < width ? sum(x + LANES, width - x - LANES) : V<A>{});
    } else {
      for (; x < width; x += LANES) {
        const V<A> v = sum(x, width - x);
        for (int64_t i = x; i < std::min(x + LANES, width); i++) line[i % stride * pitch + i / stride] = v[i - x];
      }
    }
  };
  for (int64_t l = 0; l < count; l++, line += line_size) {
    if (first[l] >= 0 && first[l] + taps <= rows.height) {
      const T* image = rows.image + first[l] * rows.pitch;
      one(WeightedSum<T, TAPS>(weight[l], taps, [&](int k) { return image + k * rows.pitch; }));
    } else {
      one(WeightedSum<T, TAPS>(weight[l], taps, [&](int k) { return rows[first[l] + k]; }));
    }
  }
}

// Where a run of outputs goes, and what is done to it on the way.
template <class T, bool ACTIVATED>
struct Destination {
  using A = Accumulator<T>;
  Writer<T> writer;
  uint8_t* bits;
  A slope, gain;

  Destination(const Upfirdn2d& call, bool streams, int64_t offset)
      : writer{static_cast<T*>(call.y) + offset, streams},
        bits(ACTIVATED ? call.activation.bits + offset / LANES : nullptr),
        slope(call.activation.slope),
        gain(call.activation.gain) {}

  inline void put(int64_t i, V<A> v, V<A> bias, int64_t n = LANES) const {
    if constexpr (ACTIVATED) {
      const Activated<A> activated = leaky_relu(v + bias, slope, gain);
      bits[i / LANES] = activated.bits;
      v = activated.y;
    }
    writer.put(i, v, n);
  }

  // Sixteen.
  inline void put(int64_t i, const V16<A>& v, const V16<A>& bias) const {
    if constexpr (ACTIVATED) writer.put(i, leaky_relu<A>(v + bias, slope, gain, bits + i / LANES));
    else writer.put(i, v);
  }

#if defined(__AVX512F__)
  // n of sixteen; a multiple of eight with ACTIVATED.
  inline void put(int64_t i, __m512 y, __m512 bias, int64_t n) const {
    V16<float> v = as<V16<float>>(y);
    if constexpr (ACTIVATED) {
      uint8_t both[2];
      v = leaky_relu<float>(v + as<V16<float>>(bias), slope, gain, both);
      std::memcpy(bits + i / LANES, both, n > LANES ? 2 : 1);
    }
    if (n >= 2 * LANES) _mm512_storeu_ps(writer.y + i, as<__m512>(v));  // a masked store takes several times as long
    else if (n == LANES) _mm256_storeu_ps(writer.y + i, _mm512_castps512_ps256(as<__m512>(v)));
    else _mm512_mask_storeu_ps(writer.y + i, static_cast<__mmask16>((1 << n) - 1), as<__m512>(v));
  }
#endif

  void next(int64_t width) {
    writer.y += width;
    bits += ACTIVATED ? width / LANES : 0;
  }
};

// Rows [begin, end) of outputs: output m * phases + p is the sum over k of weight[p][k] * line[offset[p][k] + m].
template <class T, int TAPS, int PHASES, bool ACTIVATED, class A = Accumulator<T>>
void filter_rows(const Plan<T>& plan, int64_t begin, int64_t end, const A* lines, int64_t first_line, int64_t line_size,
                 const int64_t* offset, Destination<T, ACTIVATED> out, A bias, A* row) {
  const int taps = plan.taps, phases = plan.horizontal.phases;
  const int64_t width = plan.call.horizontal.out;
  const V<A> shift = splat(bias);
  const V16<A> shifts = join<A>(shift, shift);
  for (int64_t r = begin; r < end; r++, out.next(width)) {
    const A* const line = lines + (plan.line_of(r) - first_line) * line_size;
    const A* const weight = plan.along_row(r);
    const auto phase = [&](int p) {
      return WeightedSum<A, TAPS>(weight + p * taps, taps, [&](int k) { return line + offset[p * taps + k]; });
    };
    int64_t i = 0;
    if constexpr (PHASES == 1) {
      const auto sum = phase(0);
      for (; i + 2 * LANES <= width; i += 2 * LANES) out.put(i, join<A>(sum(i), sum(i + LANES)), shifts);
      for (; i < width; i += LANES) out.put(i, sum(i), shift, width - i);
    } else if constexpr (PHASES == 2) {
      const auto even = phase(0), odd = phase(1);
      const auto interleaved = [&]() -> V16<A> {
        return __builtin_shufflevector(even(i / 2), odd(i / 2), 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
      };
      for (; i + 2 * LANES <= width; i += 2 * LANES) out.put(i, interleaved(), shifts);
      if (i < width) {
        const V16<A> rest = interleaved();
        out.put(i, low_half<A>(rest), shift, width - i);
        if (i + LANES < width) out.put(i + LANES, high_half<A>(rest), shift, width - i - LANES);
      }
    } else {
      for (; i < width; i += LANES * phases) {
        for (int p = 0; p < phases; p++) {
          const V<A> v = phase(p)(i / phases);
          for (int lane = 0; lane < LANES; lane++) row[lane * phases + p] = v[lane];
        }
        const int64_t size = std::min<int64_t>(LANES * phases, width - i);
        for (int64_t j = 0; j < size; j += LANES) out.put(i + j, load(row + j), shift, size - j);
      }
    }
  }
}

template <class T, bool ACTIVATED>
void run_nchw(const Plan<T>& plan, bool streams) {
  using A = Accumulator<T>;
  const Upfirdn2d& call = plan.call;
  const Polyphase &vertical = plan.vertical, &horizontal = plan.horizontal;
  const int phases = horizontal.phases, stride = horizontal.stride;
  const int64_t height = call.vertical.in, width = call.horizontal.in, out_width = call.horizontal.out;

  // A line holds column x at x + margin, split by stride.
  int64_t leftmost = 0, rightmost = width - 1;
  const int64_t last = (round_up(out_width, LANES * phases) / phases - 1) * stride;
  for (int p = 0; p < phases; p++) {
    leftmost = std::min(leftmost, horizontal.first(p));
    rightmost = std::max(rightmost, horizontal.first(p) + horizontal.taps - 1 + last);
  }
  const int64_t margin = round_up(-leftmost, 2 * LANES * stride);
  const int64_t pitch = round_up((margin + rightmost) / stride + 1 + LANES, 2 * LANES);
  const int64_t line_size = pitch * stride;
  std::vector<int64_t> offsets;
  for (int p = 0; p < phases; p++)
    for (int k = 0; k < plan.taps; k++) {
      const int64_t x = margin + horizontal.first(p) + k % horizontal.taps;
      offsets.push_back(k / horizontal.taps * line_size + x % stride * pitch + x / stride);
    }

  const int64_t rows_at_a_time = plan.rows_at_a_time(line_size * sizeof(A));
  const int64_t strips = (call.vertical.out + rows_at_a_time - 1) / rows_at_a_time;
  const int64_t max_lines = call.separable ? rows_at_a_time : rows_at_a_time * vertical.stride + vertical.taps;

  const auto sum = with_taps(call.separable ? vertical.taps : 1, [&](auto taps) {
    return with_factor(stride, [&](auto factor) { return &sum_rows<T, taps(), factor()>; });
  });
  const auto filter = with_taps(plan.taps, [&](auto taps) {
    return with_factor(phases, [&](auto factor) { return &filter_rows<T, taps(), factor(), ACTIVATED>; });
  });
  const int64_t grain = std::max<int64_t>(1, GRAIN / (rows_at_a_time * out_width));
  at::parallel_for(0, call.n * call.c * strips, grain, [&](int64_t unit, int64_t units) {
    const Zeros<A> scratch(max_lines * line_size + LANES * phases);
    A* const row = scratch.data() + max_lines * line_size;
    const Zeros<T> zeros(width);
    for (; unit < units; unit++) {
      const int64_t plane = unit / strips, begin = unit % strips * rows_at_a_time;
      const int64_t end = std::min(begin + rows_at_a_time, call.vertical.out);
      const T* x = static_cast<const T*>(call.x) + plane * height * width;
      const A bias = plan.bias[plane % call.c];
      const auto [first, last] = plan.lines(begin, end);
      plan.sum_lines(sum, {x, zeros.data(), height, width}, first, last, scratch.data() + margin / stride, line_size, width, stride, pitch);
      filter(plan, begin, end, scratch.data(), first, line_size, offsets.data(),
             {call, streams, (plane * call.vertical.out + begin) * out_width}, bias, row);
    }
    fence();
  });
}

#if defined(__AVX512F__)
// Planes at most 16 wide, with AVX-512: a row is one register. The vertical sum keeps the rows it needs in registers, and
// the horizontal one is a few permutations of its result, weighted lane by lane: no line, and no loop along the row.
constexpr int64_t SMALL = 16;
constexpr int SMALL_TAPS = 4;

bool is_small(const Plan<float>& plan) {
  const Upfirdn2d& call = plan.call;
  return !call.channels_last && call.separable && call.horizontal.in <= SMALL && call.horizontal.out <= 2 * SMALL &&
         plan.vertical.taps <= SMALL_TAPS && plan.horizontal.taps <= SMALL_TAPS;
}

struct Lanes {  // one tap of sixteen outputs: which lane of the inputs, if any, with what weight
  __m512i index;
  __mmask16 inside;
  __m512 weight;

  Lanes(const Plan<float>& plan, int64_t begin, int tap) {
    alignas(64) int32_t from[SMALL] = {};
    alignas(64) float weights[SMALL] = {};
    inside = 0;
    for (int64_t o = begin; o < std::min(begin + SMALL, plan.call.horizontal.out); o++) {
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

// The sum of weights[k] * terms[k]. If weights come in equal pairs, additions take the place of half the products, which
// the additions of other units do at the same time.
template <bool SYMMETRIC, int TAPS, class Term>
inline __m512 weighted(const __m512 (&weights)[TAPS], const Term& term) {
  if constexpr (SYMMETRIC) {
    const __m512 outer = _mm512_add_ps(term(0), term(3)), inner = _mm512_add_ps(term(1), term(2));
    return _mm512_fmadd_ps(weights[1], inner, _mm512_mul_ps(weights[0], outer));
  } else {
    __m512 sum = _mm512_mul_ps(weights[0], term(0));
    for (int k = 1; k < TAPS; k++) sum = _mm512_fmadd_ps(weights[k], term(k), sum);
    return sum;
  }
}

// STEP: how far the rows move from output to output; 0: not the same everywhere. A tap that the filter does not have
// reads zeros. SYMMETRIC: all outputs have the same four weights, a, b, b, a.
template <int TAPS, int STEP, int OUTS, bool SYMMETRIC, bool ACTIVATED>
void run_small(const Plan<float>& plan) {
  const Upfirdn2d& call = plan.call;
  const int64_t height = call.vertical.in, width = call.horizontal.in, out_height = call.vertical.out;
  const int64_t out_width = call.horizontal.out, planes = call.n * call.c;
  const auto row_mask = static_cast<__mmask16>((1 << width) - 1);
  std::vector<float> weights(plan.vertical.phases * TAPS);
  for (int phase = 0; phase < plan.vertical.phases; phase++)
    std::copy_n(plan.row_weights.data() + phase * plan.vertical.taps, plan.vertical.taps, weights.data() + phase * TAPS);
  at::parallel_for(0, planes, std::max<int64_t>(1, GRAIN / (out_height * out_width)), [&](int64_t plane, int64_t end) {
    __m512i index[OUTS][TAPS];
    __mmask16 inside[OUTS][TAPS];
    __m512 weight[OUTS][TAPS];
    for (int v = 0; v < OUTS; v++)
      for (int k = 0; k < TAPS; k++) {
        const Lanes lanes(plan, v * SMALL, k);
        index[v][k] = lanes.index, inside[v][k] = lanes.inside, weight[v][k] = lanes.weight;
      }
    __m512 first_weights[TAPS];
    for (int k = 0; k < TAPS; k++) first_weights[k] = _mm512_set1_ps(weights[k]);
    for (; plane < end; plane++) {
      const float* x = static_cast<const float*>(call.x) + plane * height * width;
      const auto row = [&](int64_t i) {
        return _mm512_maskz_loadu_ps(i >= 0 && i < height ? row_mask : 0, x + i * width);
      };
      const __m512 shift = _mm512_set1_ps(plan.bias[plane % call.c]);
      Destination<float, ACTIVATED> out(call, false, plane * out_height * out_width);
      __m512 rows[TAPS];
      for (int k = STEP; k < TAPS && STEP; k++) rows[k] = row(plan.vertical.first(0) - STEP + k);
      const auto output = [&](const auto& by) {
        const __m512 sum = weighted<SYMMETRIC, TAPS>(by, [&](int k) { return rows[k]; });
        for (int v = 0; v < OUTS; v++) {
          const auto term = [&](int k) { return _mm512_maskz_permutexvar_ps(inside[v][k], index[v][k], sum); };
          out.put(v * SMALL, weighted<SYMMETRIC, TAPS>(weight[v], term), shift, out_width - v * SMALL);
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

bool is_symmetric(const std::vector<float>& weights) {  // of the one phase of an axis
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
  const bool wide = plan.call.horizontal.out > SMALL, few = std::max(plan.vertical.taps, plan.horizontal.taps) <= 2;
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  using Four = std::integral_constant<int, 4>;
  if (few) wide ? run(Two(), Two()) : run(Two(), One());
  else wide ? run(Four(), Two()) : run(Four(), One());
}
#endif

// Rows [begin, end) and columns [left, right) of outputs: channel c of output o is the sum over k of weight[k] *
// line[first(o) - begin_x][offset[k] + c]. Where all outputs have the same weights and neighbors read neighbors, a row is
// one run of numbers; else a pixel is.
template <class T, int TAPS, bool ACTIVATED, class A = Accumulator<T>>
void filter_pixels(const Plan<T>& plan, int64_t begin, int64_t end, int64_t left, int64_t right, const A* lines,
                   int64_t first_line, int64_t line_size, const int64_t* offset, Destination<T, ACTIVATED> out) {
  const int taps = TAPS ? TAPS : plan.taps;
  const int64_t channels = plan.call.c, begin_x = plan.horizontal.first(left);
  const bool whole = !ACTIVATED && plan.horizontal.phases == 1 && plan.horizontal.stride == 1;
  const int64_t step = whole ? right - left : 1, size = step * channels;
  const A* const bias = plan.bias.data();
  for (int64_t r = begin; r < end; r++, out.next(plan.call.horizontal.out * channels)) {
    const A* const line = lines + (plan.line_of(r) - first_line) * line_size;
    const A* const weight = plan.along_row(r);
    Destination<T, ACTIVATED> pixel(out);
    for (int64_t o = left; o < right; o += step, pixel.next(size)) {
      const A* const first = line + (plan.horizontal.first(o) - begin_x) * channels;
      const WeightedSum<A, TAPS> sum(weight + plan.horizontal.phase(o) * taps, taps, [&](int k) { return first + offset[k]; });
      int64_t i = 0;
      const auto shift = [&](int64_t c) { return ACTIVATED ? load(bias + c) : V<A>{}; };
      for (; i + 2 * LANES <= size; i += 2 * LANES)
        pixel.put(i, join<A>(sum(i), sum(i + LANES)), join<A>(shift(i), shift(i + LANES)));
      if (i + LANES <= size) pixel.put(i, sum(i), shift(i)), i += LANES;
      if (i < size) pixel.put(i, sum(i), V<A>{}, size - i);
    }
  }
}

template <class T, bool ACTIVATED>
void run_nhwc(const Plan<T>& plan, bool streams) {
  using A = Accumulator<T>;
  const Upfirdn2d& call = plan.call;
  const Polyphase &vertical = plan.vertical, &horizontal = plan.horizontal;
  const int64_t height = call.vertical.in, width = call.horizontal.in, channels = call.c;
  const int64_t out_width = call.horizontal.out;

  // A tile of output columns, and the input columns that it reads.
  const int64_t pixels = std::max<int64_t>(1, TILE_BYTES / (channels * sizeof(A)) - horizontal.taps);
  const int64_t tile = std::clamp<int64_t>(pixels / horizontal.stride * horizontal.phases, 1, out_width);
  const int64_t tiles = (out_width + tile - 1) / tile;
  const int64_t line_pixels = (tile / horizontal.phases + 2) * horizontal.stride + horizontal.taps;
  const int64_t line_size = round_up(line_pixels * channels + LANES, LANES);
  std::vector<int64_t> offsets;
  for (int k = 0; k < plan.taps; k++)
    offsets.push_back(k / horizontal.taps * line_size + k % horizontal.taps * channels);

  const int64_t rows_at_a_time = plan.rows_at_a_time(line_size * sizeof(A));
  const int64_t strips = (call.vertical.out + rows_at_a_time - 1) / rows_at_a_time;
  const int64_t max_lines = call.separable ? rows_at_a_time : rows_at_a_time * vertical.stride + vertical.taps;

  const auto sum = with_taps(call.separable ? vertical.taps : 1, [&](auto taps) { return &sum_rows<T, taps(), 1>; });
  const auto filter = with_taps(plan.taps, [&](auto taps) { return &filter_pixels<T, taps(), ACTIVATED>; });
  const int64_t grain = std::max<int64_t>(1, GRAIN / (rows_at_a_time * tile * channels));
  at::parallel_for(0, call.n * strips * tiles, grain, [&](int64_t unit, int64_t units) {
    const Zeros<A> scratch(max_lines * line_size);
    const Zeros<T> zeros(line_size);
    for (; unit < units; unit++) {
      const int64_t image = unit / (strips * tiles), begin = unit % strips * rows_at_a_time;
      const int64_t end = std::min(begin + rows_at_a_time, call.vertical.out);
      const int64_t left = unit / strips % tiles * tile, right = std::min(left + tile, out_width);
      const int64_t begin_x = horizontal.first(left), end_x = horizontal.first(right - 1) + horizontal.taps;
      const int64_t inside = std::min(std::max<int64_t>(begin_x, 0), end_x), outside = std::max(std::min(end_x, width), inside);
      const T* x = static_cast<const T*>(call.x) + image * height * width * channels;
      const auto [first, last] = plan.lines(begin, end);
      for (int64_t l = first; l < last; l++) {
        A* const line = scratch.data() + (l - first) * line_size;
        std::fill(line, line + (inside - begin_x) * channels, A(0));
        std::fill(line + (outside - begin_x) * channels, line + (end_x - begin_x) * channels, A(0));
      }
      const Rows<T> rows{x + inside * channels, zeros.data(), height, width * channels};
      A* const to = scratch.data() + (inside - begin_x) * channels;
      plan.sum_lines(sum, rows, first, last, to, line_size, (outside - inside) * channels, 1, 0);
      filter(plan, begin, end, left, right, scratch.data(), first, line_size, offsets.data(),
             {call, streams, ((image * call.vertical.out + begin) * out_width + left) * channels});
    }
    fence();
  });
}

template <class T>
void run(const Upfirdn2d& call) {
  const Plan<T> plan(call);
  const int64_t row = call.channels_last ? call.c : call.horizontal.out;
  const bool streams = call.n * call.c * call.vertical.out * call.horizontal.out * sizeof(T) > STREAM_BYTES && row % LANES == 0;
  const auto run = [&](auto activated) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, float>)
      if (is_small(plan)) return run_small<activated()>(plan);
#endif
    if (call.channels_last) run_nhwc<T, activated()>(plan, streams);
    else run_nchw<T, activated()>(plan, streams);
  };
  call.activated ? run(std::true_type()) : run(std::false_type());
}

// A line's bits begin on a byte only where it is a multiple of eight long; elsewhere the epilogue takes a pass of its own.
void run_on_cpu(Upfirdn2d call) {
  const bool ragged = (call.channels_last ? call.c : call.horizontal.out) % LANES != 0;
  const bool apart = call.activated && ragged;
  call.activated = call.activated && !ragged;
  dispatch(call.type, [&](auto element) { run<decltype(element)>(call); });
  if (!apart) return;
  const int64_t plane = call.vertical.out * call.horizontal.out;
  bias_leaky_relu_cpu({call.type, call.channels_last ? call.n * plane : call.n, call.c, call.channels_last ? 1 : plane,
                       call.y, call.y, call.activation});
}

Axis axis_of(int64_t in, int64_t up, int64_t down, int64_t before, int64_t after, int64_t taps) {
  const int64_t out = (in * up + before + after - taps) / down + 1;
  return {in, out, static_cast<int>(up), static_cast<int>(down), static_cast<int>(taps), before};
}

// The result, and the bits if `bits` is given: then with the epilogue.
at::Tensor call_upfirdn2d(const at::Tensor& input, const at::Tensor& filter, at::IntArrayRef up, at::IntArrayRef down,
                          at::IntArrayRef padding, bool flip, double gain, const std::optional<at::Tensor>& bias,
                          double slope, double activation_gain, at::Tensor* bits) {
  const bool channels_last = is_channels_last(input);
  const at::Tensor x = dense(input, channels_last);
  const at::Tensor taps = filter.to(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous();
  Upfirdn2d call{type_of(x), channels_last, x.size(0), x.size(1)};
  call.vertical = axis_of(x.size(2), up[0], down[0], padding[0], padding[1], taps.size(0));
  call.horizontal = axis_of(x.size(3), up[1], down[1], padding[2], padding[3], taps.size(-1));
  const at::Tensor y = at::empty({x.size(0), x.size(1), call.vertical.out, call.horizontal.out}, x.options(),
                                 channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  const at::Tensor shift = bias ? bias->contiguous() : at::Tensor();
  call.x = x.const_data_ptr();
  call.filter = taps.const_data_ptr();
  call.y = y.mutable_data_ptr();
  call.separable = taps.dim() == 1;
  call.flip = flip;
  call.gain = gain;
  call.activated = bits != nullptr;
  if (bits) {
    *bits = empty_bits(y);
    call.activation = {bias ? shift.const_data_ptr() : nullptr, bits->mutable_data_ptr<uint8_t>(), slope, activation_gain};
  }
#if defined(GAN_OPS_CUDA)
  if (x.is_cuda()) {
    on_device_of(x, [&](void* stream) { return upfirdn2d_cuda(call, stream); });
    return y;
  }
#endif
  run_on_cpu(call);
  return y;
}

at::Tensor upfirdn2d(const at::Tensor& x, const at::Tensor& filter, at::IntArrayRef up, at::IntArrayRef down,
                     at::IntArrayRef padding, bool flip, double gain) {
  return call_upfirdn2d(x, filter, up, down, padding, flip, gain, {}, 1, 1, nullptr);
}

std::tuple<at::Tensor, at::Tensor> upfirdn2d_bias_leaky_relu(
    const at::Tensor& x, const at::Tensor& filter, const std::optional<at::Tensor>& bias, at::IntArrayRef up,
    at::IntArrayRef down, at::IntArrayRef padding, bool flip, double filter_gain, double slope, double gain) {
  at::Tensor bits;
  at::Tensor y = call_upfirdn2d(x, filter, up, down, padding, flip, filter_gain, bias, slope, gain, &bits);
  return {y, bits};
}

}  // namespace
}  // namespace gan_ops

GAN_OPS_IMPL(m, {
  m.impl("upfirdn2d", &gan_ops::upfirdn2d);
  m.impl("upfirdn2d_bias_leaky_relu", &gan_ops::upfirdn2d_bias_leaky_relu);
})
