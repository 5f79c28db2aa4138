// What the CPU kernels of upfirdn2d share: the call in polyphase form.
#pragma once
#include <utility>
#include <vector>

#include "cpu.h"
#include "polyphase.h"
#include "upfirdn2d.h"

namespace gan_ops {

constexpr int64_t SCRATCH_BYTES = 8 << 10;  // lines in flight: inputs and outputs want the first-level cache too
constexpr int64_t GRAIN = 32 << 10;  // outputs that are worth a thread

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

  // Where outputs go, from the one at `offset` on.
  Writer<T> writer(int64_t offset, bool streams) const { return {static_cast<T*>(call.y) + offset, streams}; }

  // How many rows of outputs to take at a time, with lines of `bytes` each.
  int64_t rows_at_a_time(int64_t bytes) const {
    return std::clamp<int64_t>(SCRATCH_BYTES / bytes, 1, call.vertical.out);
  }
};

}  // namespace gan_ops
