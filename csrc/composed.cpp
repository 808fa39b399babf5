#include "composed.h"

#include "mlx/ops.h"
#include "mlx/utils.h"

namespace mlx_fused {

namespace {

// A Python number beside an array: it takes the array's dtype unless that is
// an integer's.
mx::array weak(double value, const mx::array& like) {
  return mx::array(value, mx::issubdtype(like.dtype(), mx::inexact)
                              ? like.dtype()
                              : mx::float32);
}

mx::array times(double value, const mx::array& a) { return weak(value, a) * a; }

mx::array plus(const mx::array& a, double value) { return a + weak(value, a); }

mx::array one_minus(const mx::array& a) { return weak(1, a) - a; }

// Parameter p, states s and gradient g of one tensor; h is in the order of the
// rule's prepare().
using Tensor = std::vector<mx::array>;
using Hyperparameters = std::vector<double>;

Tensor update_sgd(const Hyperparameters& h, const mx::array& p, mx::array g,
                  const mx::array& learning_rate) {
  if (h[0] != 0) {
    g = g + times(h[0], p);
  }
  return {p - mx::astype(learning_rate, g.dtype()) * g};
}

Tensor update_momentum(const Hyperparameters& h, const mx::array& p,
                       const mx::array& v, mx::array g,
                       const mx::array& learning_rate) {
  if (h[2] != 0) {
    g = g + times(h[2], p);
  }
  const auto next_v = times(h[0], v) + (h[1] != 1 ? times(h[1], g) : g);
  const auto update = h[3] != 0 ? g + times(h[0], next_v) : next_v;
  return {p - mx::astype(learning_rate, g.dtype()) * update, next_v};
}

Tensor update_adam(const Hyperparameters& h, mx::array p, const mx::array& m,
                   const mx::array& v, const mx::array& g,
                   const mx::array& learning_rate, const mx::array& step) {
  const auto rate = mx::astype(learning_rate, g.dtype());
  if (h[5] != 0) {
    p = p * one_minus(times(h[5], rate));
  }
  const auto next_m = times(h[0], m) + times(h[1], g);
  const auto next_v = times(h[2], v) + times(h[3], mx::square(g));
  if (h[6] == 0) {
    const auto denominator = plus(mx::sqrt(next_v), h[4]);
    return {p - rate * next_m / denominator, next_m, next_v};
  }
  const auto correction = [&](double beta) {
    return one_minus(mx::power(mx::array(beta, mx::float32), step));
  };
  const auto c1 = mx::astype(rate / correction(h[0]), g.dtype());
  const auto c2 = mx::astype(mx::rsqrt(correction(h[2])), g.dtype());
  const auto denominator = plus(mx::sqrt(next_v) * c2, h[4]);
  return {p - c1 * next_m / denominator, next_m, next_v};
}

Tensor update_lion(const Hyperparameters& h, mx::array p, const mx::array& m,
                   const mx::array& g, const mx::array& learning_rate) {
  const auto rate = mx::astype(learning_rate, g.dtype());
  const auto c = times(h[0], m) + times(h[1], g);
  const auto next_m = times(h[2], m) + times(h[3], g);
  if (h[4] != 0) {
    p = one_minus(times(h[4], rate)) * p;
  }
  return {p - rate * mx::sign(c), next_m};
}

Tensor update_rmsprop(const Hyperparameters& h, const mx::array& p,
                      const mx::array& v, const mx::array& g,
                      const mx::array& learning_rate) {
  const auto rate = mx::astype(learning_rate, g.dtype());
  const auto next_v = times(h[0], v) + times(h[1], mx::square(g));
  return {p - rate * g / plus(mx::sqrt(next_v), h[2]), next_v};
}

Tensor update_adagrad(const Hyperparameters& h, const mx::array& p,
                      const mx::array& v, const mx::array& g,
                      const mx::array& learning_rate) {
  const auto rate = mx::astype(learning_rate, g.dtype());
  const auto next_v = v + mx::square(g);
  return {p - rate * g / plus(mx::sqrt(next_v), h[0]), next_v};
}

Tensor update_adadelta(const Hyperparameters& h, const mx::array& p,
                       const mx::array& v, const mx::array& u,
                       const mx::array& g, const mx::array& learning_rate) {
  const auto rate = mx::astype(learning_rate, g.dtype());
  const auto next_v = times(h[0], v) + times(h[1], mx::square(g));
  const auto d = mx::sqrt(plus(u, h[2])) / mx::sqrt(plus(next_v, h[2])) * g;
  const auto next_u = times(h[0], u) + times(h[1], mx::square(d));
  return {p - rate * d, next_v, next_u};
}

Tensor update_adamax(const Hyperparameters& h, const mx::array& p,
                     const mx::array& m, const mx::array& v, const mx::array& g,
                     const mx::array& learning_rate) {
  const auto rate = mx::astype(learning_rate, g.dtype());
  const auto next_m = times(h[0], m) + times(h[1], g);
  const auto next_v = mx::maximum(times(h[2], v), mx::abs(g));
  return {p - rate * next_m / plus(next_v, h[3]), next_m, next_v};
}

Tensor update_adafactor(double weight_decay, const mx::array& p,
                        const mx::array& update,
                        const mx::array& learning_rate) {
  if (weight_decay == 0) {
    return {p - update};
  }
  return {p +
          p * times(-weight_decay, mx::astype(learning_rate, update.dtype())) -
          update};
}

Tensor update_adafactor_with_moment(const Hyperparameters& h,
                                    const mx::array& p, const mx::array& m,
                                    const mx::array& update,
                                    const mx::array& learning_rate) {
  const auto next_m = times(h[0], m) + times(h[1], update);
  return {update_adafactor(h[2], p, next_m, learning_rate)[0], next_m};
}

Tensor update_muon_moment(const Hyperparameters& h, mx::array gradient,
                          const mx::array& v, const mx::array& p) {
  if (h[2] != 0) {
    gradient = gradient + times(h[2], p);
  }
  const auto next_v = times(h[0], v) + times(h[1], gradient);
  return {h[3] != 0 ? times(h[1], gradient) + times(h[0], next_v) : next_v,
          next_v};
}

}  // namespace

std::function<std::vector<mx::array>(const std::vector<mx::array>&)>
composed_update(Rule rule, std::vector<double> hyperparameters,
                GroupLayout layout, mx::Stream stream) {
  return [=, h = std::move(hyperparameters)](
             const std::vector<mx::array>& inputs) {
    const mx::StreamContext context(stream);
    const auto& learning_rate = inputs[layout.learning_rate()];
    const auto& step = inputs[layout.step()];
    std::vector<mx::array> outputs;
    for (int tensor = 0; tensor < layout.tensors; ++tensor) {
      const auto in = [&](int k) { return inputs[layout.input(tensor, k)]; };
      const auto scaled = [&](const mx::array& a) {
        return layout.scaled
                   ? mx::astype(a * inputs[layout.gradient_scale()], a.dtype())
                   : a;
      };
      Tensor updated;
      switch (rule) {
        case Rule::SGD:
          updated = update_sgd(h, in(0), scaled(in(1)), learning_rate);
          break;
        case Rule::Momentum:
          updated =
              update_momentum(h, in(0), in(1), scaled(in(2)), learning_rate);
          break;
        case Rule::Adam:
          updated = update_adam(h, in(0), in(1), in(2), scaled(in(3)),
                                learning_rate, step);
          break;
        case Rule::Lion:
          updated = update_lion(h, in(0), in(1), scaled(in(2)), learning_rate);
          break;
        case Rule::RMSprop:
          updated =
              update_rmsprop(h, in(0), in(1), scaled(in(2)), learning_rate);
          break;
        case Rule::Adagrad:
          updated =
              update_adagrad(h, in(0), in(1), scaled(in(2)), learning_rate);
          break;
        case Rule::AdaDelta:
          updated = update_adadelta(h, in(0), in(1), in(2), scaled(in(3)),
                                    learning_rate);
          break;
        case Rule::Adamax:
          updated = update_adamax(h, in(0), in(1), in(2), scaled(in(3)),
                                  learning_rate);
          break;
        case Rule::Adafactor:
          updated = update_adafactor(h[0], in(0), scaled(in(1)), learning_rate);
          break;
        case Rule::AdafactorWithMoment:
          updated = update_adafactor_with_moment(h, in(0), in(1), scaled(in(2)),
                                                 learning_rate);
          break;
        case Rule::MuonMoment:
          updated = update_muon_moment(h, scaled(in(0)), in(1), in(2));
          break;
        case Rule::Scale:
          updated = {scaled(in(0))};
          break;
      }
      for (size_t k = 0; k < updated.size(); ++k) {
        outputs.push_back(
            layout.scaled
                ? mx::where(inputs[layout.gradient_scale()] < mx::array(0.0f),
                            in(k), updated[k])
                : updated[k]);
      }
    }
    return outputs;
  };
}

std::function<std::vector<mx::array>(const std::vector<mx::array>&)>
composed_norm(mx::Stream stream) {
  return [=](const std::vector<mx::array>& inputs) {
    const mx::StreamContext context(stream);
    mx::array squares(0.0f);
    for (size_t i = 0; i + 1 < inputs.size(); ++i) {
      squares =
          squares + mx::sum(mx::square(mx::astype(inputs[i], mx::float32)));
    }
    const auto norm = mx::sqrt(squares);
    const auto factor =
        mx::minimum(inputs.back() / plus(norm, 1e-6), weak(1, norm));
    return std::vector<mx::array>{norm, factor};
  };
}

}  // namespace mlx_fused
