// Any upfirdn2d on any CPU, by lines. Separable filters take one pass: the rows that an output row needs are summed into
// a line that stays in the cache, and the line is filtered along the row. Full filters copy rows into lines and sum over
// all taps along the row. Lines have zero margins, so that no loop asks where an image ends. NCHW reads eight neighbors
// of a line at a time; where the stride is not one, a line is split by column modulo the stride. NHWC reads eight channels
// of a pixel.
#pragma once
#include "upfirdn2d_plan.h"

namespace gan_ops {

constexpr int64_t TILE_BYTES = 32 << 10;    // one line of pixels

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

// Rows [begin, end) of outputs: output m * phases + p is the sum over k of weight[p][k] * line[offset[p][k] + m].
template <class T, int TAPS, int PHASES, class A = Accumulator<T>>
void filter_rows(const Plan<T>& plan, int64_t begin, int64_t end, const A* lines, int64_t first_line, int64_t line_size,
                 const int64_t* offset, Writer<T> out, A* row) {
  const int taps = plan.taps, phases = plan.horizontal.phases;
  const int64_t width = plan.call.horizontal.out;
  for (int64_t r = begin; r < end; r++, out.y += width) {
    const A* const line = lines + (plan.line_of(r) - first_line) * line_size;
    const A* const weight = plan.along_row(r);
    const auto phase = [&](int p) {
      return WeightedSum<A, TAPS>(weight + p * taps, taps, [&](int k) { return line + offset[p * taps + k]; });
    };
    int64_t i = 0;
    if constexpr (PHASES == 1) {
      const auto sum = phase(0);
      for (; i + 2 * LANES <= width; i += 2 * LANES) out.put(i, join<A>(sum(i), sum(i + LANES)));
      for (; i < width; i += LANES) out.put(i, sum(i), width - i);
    } else if constexpr (PHASES == 2) {
      const auto even = phase(0), odd = phase(1);
      const auto interleaved = [&]() -> V16<A> {
        return __builtin_shufflevector(even(i / 2), odd(i / 2), 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
      };
      for (; i + 2 * LANES <= width; i += 2 * LANES) out.put(i, interleaved());
      if (i < width) {
        const V16<A> rest = interleaved();
        out.put(i, low_half<A>(rest), width - i);
        if (i + LANES < width) out.put(i + LANES, high_half<A>(rest), width - i - LANES);
      }
    } else {
      for (; i < width; i += LANES * phases) {
        for (int p = 0; p < phases; p++) {
          const V<A> v = phase(p)(i / phases);
          for (int lane = 0; lane < LANES; lane++) row[lane * phases + p] = v[lane];
        }
        const int64_t size = std::min<int64_t>(LANES * phases, width - i);
        for (int64_t j = 0; j < size; j += LANES) out.put(i + j, load(row + j), size - j);
      }
    }
  }
}

template <class T>
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
    return with_factor(phases, [&](auto factor) { return &filter_rows<T, taps(), factor()>; });
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
      const auto [first, last] = plan.lines(begin, end);
      plan.sum_lines(sum, {x, zeros.data(), height, width}, first, last, scratch.data() + margin / stride, line_size, width, stride, pitch);
      filter(plan, begin, end, scratch.data(), first, line_size, offsets.data(),
             plan.writer((plane * call.vertical.out + begin) * out_width, streams), row);
    }
    fence();
  });
}

// Rows [begin, end) and columns [left, right) of outputs: channel c of output o is the sum over k of weight[k] *
// line[first(o) - begin_x][offset[k] + c]. Where all outputs have the same weights and neighbors read neighbors, a row is
// one run of numbers; else a pixel is.
template <class T, int TAPS, class A = Accumulator<T>>
void filter_pixels(const Plan<T>& plan, int64_t begin, int64_t end, int64_t left, int64_t right, const A* lines,
                   int64_t first_line, int64_t line_size, const int64_t* offset, Writer<T> out) {
  const int taps = TAPS ? TAPS : plan.taps;
  const int64_t channels = plan.call.c, begin_x = plan.horizontal.first(left);
  const bool whole = plan.horizontal.phases == 1 && plan.horizontal.stride == 1;
  const int64_t step = whole ? right - left : 1, size = step * channels;
  for (int64_t r = begin; r < end; r++, out.y += plan.call.horizontal.out * channels) {
    const A* const line = lines + (plan.line_of(r) - first_line) * line_size;
    const A* const weight = plan.along_row(r);
    Writer<T> pixel(out);
    for (int64_t o = left; o < right; o += step, pixel.y += size) {
      const A* const first = line + (plan.horizontal.first(o) - begin_x) * channels;
      const WeightedSum<A, TAPS> sum(weight + plan.horizontal.phase(o) * taps, taps, [&](int k) { return first + offset[k]; });
      int64_t i = 0;
      for (; i + 2 * LANES <= size; i += 2 * LANES) pixel.put(i, join<A>(sum(i), sum(i + LANES)));
      if (i + LANES <= size) pixel.put(i, sum(i)), i += LANES;
      if (i < size) pixel.put(i, sum(i), size - i);
    }
  }
}

template <class T>
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
  const auto filter = with_taps(plan.taps, [&](auto taps) { return &filter_pixels<T, taps()>; });
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
             plan.writer(((image * call.vertical.out + begin) * out_width + left) * channels, streams));
    }
    fence();
  });
}

}  // namespace gan_ops
