// The autograd rules of the ops that a training step calls most, again in C++: in Python, where a rule costs 25 us a call
// and 20 more in the backward pass, they took a third of a small network's step on a CPU. The formulas are those of
// ops/*.py, which say why, and which serve wherever these are not loaded. A backward calls ops through the dispatcher,
// which finds their rules in turn: so derivatives of every order are taken.
#include <ATen/ops/add.h>
#include <torch/csrc/autograd/custom_function.h>

#include "binding.h"

namespace gan_ops {
namespace {

using at::IntArrayRef;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using Two = std::tuple<Tensor, Tensor>;

template <class Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Calls the kernel: no rule, neither of this op nor of those that the kernel is made of.
template <class Op, class... Arguments>
auto run_kernel(const Op& op, const Arguments&... arguments) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return op(arguments...);
}

bool records(std::initializer_list<bool> require_grad) {
  return at::GradMode::is_enabled() && std::ranges::count(require_grad, true);
}

// A side of an image or a filter, as a plain number, also while torch.compile traces with sizes that it leaves open.
int64_t side(const Tensor& x, int64_t dim) { return x.sym_size(dim).guard_int(__FILE__, __LINE__); }

// ---- conv2d: a sum of products of elements of y, x and w, of which each of three ops is the derivative by one

enum Slot { Y, X, W };

Tensor conv2d(const Tensor& x, const Tensor& weight, IntArrayRef padding, int64_t groups) {
  static const auto op = find_op<decltype(conv2d)>("gan_ops::conv2d");
  return op.call(x, weight, padding, groups);
}

Tensor input_gradient(const Tensor& dy, const Tensor& weight, IntArrayRef size, IntArrayRef padding, int64_t groups) {
  static const auto op = find_op<decltype(input_gradient)>("gan_ops::conv2d_input_gradient");
  return op.call(dy, weight, size, padding, groups);
}

Tensor weight_gradient(const Tensor& dy, const Tensor& x, IntArrayRef kernel, IntArrayRef padding, int64_t groups) {
  static const auto op = find_op<decltype(weight_gradient)>("gan_ops::conv2d_weight_gradient");
  return op.call(dy, x, kernel, padding, groups);
}

// The derivative by the slot `by`, a tensor with sides `size`; in its own slot there is nothing.
Tensor derivative(Slot by, const std::array<Tensor, 3>& of, IntArrayRef size, IntArrayRef padding, int64_t groups) {
  if (by == Y) return conv2d(of[X], of[W], padding, groups);
  if (by == X) return input_gradient(of[Y], of[W], size, padding, groups);
  return weight_gradient(of[Y], of[X], size, padding, groups);
}

template <Slot RESULT>
struct Convolution : Function<Convolution<RESULT>> {
  static constexpr Slot FIRST = RESULT == Y ? X : Y, SECOND = RESULT == W ? X : W;

  static std::array<Tensor, 3> filled(const Tensor& result, const Tensor& first, const Tensor& second) {
    std::array<Tensor, 3> slots;
    slots[RESULT] = result;
    slots[FIRST] = first;
    slots[SECOND] = second;
    return slots;
  }

  static Tensor forward(AutogradContext* ctx, const Tensor& first, const Tensor& second, IntArrayRef size,
                        IntArrayRef padding, int64_t groups) {
    // Not by needs_input_grad, which here would ask the backward pass that is running, if one is: it knows nothing of us.
    ctx->save_for_backward({second.requires_grad() ? first : Tensor(), first.requires_grad() ? second : Tensor()});
    ctx->saved_data["numbers"] = std::vector<int64_t>{
        side(first, 2), side(first, 3), side(second, 2), side(second, 3), padding[0], padding[1], groups};
    return run_kernel(derivative, RESULT, filled({}, first, second), size, padding, groups);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const variable_list saved = ctx->get_saved_variables();
    const std::vector<int64_t> numbers = ctx->saved_data["numbers"].toIntVector();
    const std::array<Tensor, 3> slots = filled(gradients[0], saved[0], saved[1]);
    const auto pair = [&](size_t i) { return IntArrayRef(numbers).slice(2 * i, 2); };
    variable_list to(5);
    if (ctx->needs_input_grad(0)) to[0] = derivative(FIRST, slots, pair(0), pair(2), numbers[6]);
    if (ctx->needs_input_grad(1)) to[1] = derivative(SECOND, slots, pair(1), pair(2), numbers[6]);
    return to;
  }

  static Tensor rule(const Tensor& first, const Tensor& second, IntArrayRef size, IntArrayRef padding, int64_t groups) {
    if (records({first.requires_grad(), second.requires_grad()}))
      return Convolution::apply(first, second, size, padding, groups);
    return run_kernel(derivative, RESULT, filled({}, first, second), size, padding, groups);
  }
};

Tensor conv2d_rule(const Tensor& x, const Tensor& weight, IntArrayRef padding, int64_t groups) {
  return Convolution<Y>::rule(x, weight, {}, padding, groups);
}

// ---- upfirdn2d: linear in x, its own adjoint

Tensor upfirdn2d(const Tensor& x, const Tensor& filter, IntArrayRef up, IntArrayRef down, IntArrayRef padding, bool flip,
                 double gain) {
  static const auto op = find_op<decltype(upfirdn2d)>("gan_ops::upfirdn2d");
  return op.call(x, filter, up, down, padding, flip, gain);
}

struct Resampling : Function<Resampling> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& filter, IntArrayRef up, IntArrayRef down,
                        IntArrayRef padding, bool flip, double gain) {
    const Tensor y = run_kernel(upfirdn2d, x, filter, up, down, padding, flip, gain);
    std::vector<int64_t> numbers{down[0], down[1], up[0], up[1]};  // of the adjoint
    for (const int i : {0, 1}) {
      const int64_t top = padding[2 * i];
      numbers.push_back(side(filter, i == 0 ? 0 : -1) - 1 - top);
      numbers.push_back(side(x, 2 + i) * up[i] - side(y, 2 + i) * down[i] + top - up[i] + 1);
    }
    ctx->save_for_backward({filter});
    ctx->saved_data["numbers"] = std::move(numbers);
    ctx->saved_data["flip"] = !flip;
    ctx->saved_data["gain"] = gain;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const std::vector<int64_t> numbers = ctx->saved_data["numbers"].toIntVector();
    const IntArrayRef all(numbers);
    const Tensor dx = upfirdn2d(gradients[0], ctx->get_saved_variables()[0], all.slice(0, 2), all.slice(2, 2), all.slice(4, 4),
                                ctx->saved_data["flip"].toBool(), ctx->saved_data["gain"].toDouble());
    return {dx, {}, {}, {}, {}, {}, {}};
  }
};

Tensor upfirdn2d_rule(const Tensor& x, const Tensor& filter, IntArrayRef up, IntArrayRef down, IntArrayRef padding,
                      bool flip, double gain) {
  if (records({x.requires_grad()})) return Resampling::apply(x, filter, up, down, padding, flip, gain);
  return run_kernel(upfirdn2d, x, filter, up, down, padding, flip, gain);
}

// ---- bias_leaky_relu, and its backward, which is linear in dy and its own derivative

Two bias_leaky_relu(const Tensor& x, const std::optional<Tensor>& bias, double slope, double gain) {
  static const auto op = find_op<decltype(bias_leaky_relu)>("gan_ops::bias_leaky_relu");
  return op.call(x, bias, slope, gain);
}

Two leaky_backward(const Tensor& dy, const Tensor& bits, bool channels_last, bool with_bias, double slope, double gain) {
  static const auto op = find_op<decltype(leaky_backward)>("gan_ops::bias_leaky_relu_backward");
  return op.call(dy, bits, channels_last, with_bias, slope, gain);
}

void save_leaky(AutogradContext* ctx, const Tensor& bits, bool channels_last, bool with_bias, double slope, double gain) {
  ctx->set_materialize_grads(false);
  ctx->save_for_backward({bits});
  ctx->saved_data["channels_last"] = channels_last;
  ctx->saved_data["with_bias"] = with_bias;
  ctx->saved_data["slope"] = slope;
  ctx->saved_data["gain"] = gain;
}

Two saved_leaky_backward(AutogradContext* ctx, const Tensor& dy, bool with_bias) {
  auto& saved = ctx->saved_data;
  return leaky_backward(dy, ctx->get_saved_variables()[0], saved["channels_last"].toBool(), with_bias,
                        saved["slope"].toDouble(), saved["gain"].toDouble());
}

struct Leaky : Function<Leaky> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const std::optional<Tensor>& bias, double slope,
                               double gain) {
    const auto [y, bits] = run_kernel(bias_leaky_relu, x, bias, slope, gain);
    save_leaky(ctx, bits, is_channels_last(y), bias.has_value(), slope, gain);
    ctx->mark_non_differentiable({bits});
    return {y, bits};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    if (!gradients[0].defined()) return variable_list(4);
    const bool with_bias = ctx->saved_data["with_bias"].toBool() && ctx->needs_input_grad(1);
    const auto [dx, dbias] = saved_leaky_backward(ctx, gradients[0], with_bias);
    return {dx, with_bias ? dbias : Tensor(), {}, {}};
  }
};

Two bias_leaky_relu_rule(const Tensor& x, const std::optional<Tensor>& bias, double slope, double gain) {
  if (!records({x.requires_grad(), bias && bias->requires_grad()})) return run_kernel(bias_leaky_relu, x, bias, slope, gain);
  const variable_list outputs = Leaky::apply(x, bias, slope, gain);
  return {outputs[0], outputs[1]};
}

struct LeakyBackward : Function<LeakyBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& dy, const Tensor& bits, bool channels_last,
                               bool with_bias, double slope, double gain) {
    save_leaky(ctx, bits, channels_last, with_bias, slope, gain);
    ctx->saved_data["shape"] = dy.sym_sizes();
    const auto [dx, dbias] = run_kernel(leaky_backward, dy, bits, channels_last, with_bias, slope, gain);
    return {dx, dbias};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    Tensor total = gradients[0];
    if (gradients[1].defined() && ctx->saved_data["with_bias"].toBool()) {
      const auto shape = ctx->saved_data["shape"].toSymIntVector();
      std::vector<int64_t> one_per_channel(shape.size() - 1, 1);
      one_per_channel[0] = -1;
      const Tensor broadcast = gradients[1].view(one_per_channel).expand_symint(shape);
      total = total.defined() ? at::add(total, broadcast) : broadcast;
    }
    if (!total.defined()) return variable_list(6);
    return {std::get<0>(saved_leaky_backward(ctx, total, false)), {}, {}, {}, {}, {}};
  }
};

Two leaky_backward_rule(const Tensor& dy, const Tensor& bits, bool channels_last, bool with_bias, double slope, double gain) {
  if (!records({dy.requires_grad()})) return run_kernel(leaky_backward, dy, bits, channels_last, with_bias, slope, gain);
  const variable_list outputs = LeakyBackward::apply(dy, bits, channels_last, with_bias, slope, gain);
  return {outputs[0], outputs[1]};
}

void register_rules(torch::Library& m) {
  m.impl("conv2d", &conv2d_rule);
  m.impl("conv2d_input_gradient", &Convolution<X>::rule);
  m.impl("conv2d_weight_gradient", &Convolution<W>::rule);
  m.impl("upfirdn2d", &upfirdn2d_rule);
  m.impl("bias_leaky_relu", &bias_leaky_relu_rule);
  m.impl("bias_leaky_relu_backward", &leaky_backward_rule);
}

}  // namespace
}  // namespace gan_ops

TORCH_LIBRARY_IMPL(gan_ops, AutogradCPU, m) { gan_ops::register_rules(m); }
TORCH_LIBRARY_IMPL(gan_ops, AutogradMeta, m) { gan_ops::register_rules(m); }  // for steps without numbers: gan/rehearsal.py
#if defined(GAN_OPS_CUDA)
TORCH_LIBRARY_IMPL(gan_ops, AutogradCUDA, m) { gan_ops::register_rules(m); }
#endif
