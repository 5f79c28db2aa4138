// One axis of upfirdn2d without its inserted zeros. Output o reads inputs first(o), ..., first(o) + taps - 1, of which
// those outside [0, in) are zero. Outputs `phases` apart have the same weights and read inputs `stride` apart.
#pragma once
#include <cstdint>
#include <numeric>
#include <vector>

#include "upfirdn2d.h"

namespace gan_ops {

// Smallest multiple of `unit` that is at least `size`, also below zero.
inline int64_t round_up(int64_t size, int64_t unit) { return (size >= 0 ? (size + unit - 1) / unit : -(-size / unit)) * unit; }

struct Polyphase {
  Axis axis;
  int phases, stride, taps;

  explicit Polyphase(const Axis& a) : axis(a), taps((a.taps + a.up - 1) / a.up) {
    const int common = std::gcd(a.up, a.down);
    phases = a.up / common;
    stride = a.down / common;
    for (int64_t o = 0; o < std::max<int64_t>(a.out, phases); o++) {
      first_.push_back(round_up(o * a.down - a.pad, a.up) / a.up);
      phase_.push_back(o % phases);
    }
  }

  // Of output o, or of a phase. Looked up: a row of 16 pixels takes less time than a few divisions.
  int64_t first(int64_t o) const { return first_[o]; }
  int phase(int64_t o) const { return phase_[o]; }

  // Which tap of the filter meets the k-th input of a phase; past the filter's end, none does.
  int64_t tap(int phase, int k) const { return (first(phase) + k) * axis.up - (phase * axis.down - axis.pad); }

 private:
  std::vector<int64_t> first_;
  std::vector<int> phase_;
};

// [phases][taps]: what each output of a period weighs its inputs with. `filter` is in correlation order.
template <class A, class Filter>
std::vector<A> phase_weights(const Polyphase& p, const Filter& filter) {
  std::vector<A> weights(static_cast<size_t>(p.phases) * p.taps, A(0));
  for (int phase = 0; phase < p.phases; phase++)
    for (int k = 0; k < p.taps; k++)
      if (const int64_t tap = p.tap(phase, k); tap < p.axis.taps) weights[phase * p.taps + k] = static_cast<A>(filter(tap));
  return weights;
}

}  // namespace gan_ops
