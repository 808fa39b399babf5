// The arithmetic of every optimizer, and its only place in the package.
//
// This file is written in the language that the Metal Shading Language and
// C++20 share. Three readers compile it: the Metal kernels, where T is float
// and lives in a register (metal/rule_language.h); the CPU's vector loops, the
// same (csrc/rules.h); and the graph of plain MLX operations that serves
// autodiff, vmap, other dtypes and the check of the kernels, where T is a node
// of that graph (csrc/graph/node.h). A fourth, _rules.py of the package, turns
// its text into Python for an MLX that no extension fits.
//
// A rule never sees an array or a dtype. It has
//
//   HYPERPARAMETERS(...)  by the names that Python uses. Each is a Number: the
//                         value, 1 - value and log(value), which the host
//                         derives in double precision.
//   STATES(...)           by their keys in the optimizer's state; s[0], s[1],
//                         ... in this order. A state is of the parameter's
//                         shape.
//   NON_NEGATIVE(...)     those of the states that never are negative.
//   reads_... writes_...  where it differs from RuleDefaults.
//   prepare(rate, step)   once per tensor: what depends on no element. A rule
//                         that does not read one of the two must not use it.
//   update(g, p, s)       once per element: changes the parameter p and the
//                         states s by the gradient g, which is already
//                         multiplied by the gradient scale.
//
// Operations stand in the order in which mlx.optimizers does them, so float32
// results agree to the last bits.

// A hyper-parameter.
template <typename T>
struct Number {
  T value;
  T complement;  // 1 - value
  T logarithm;   // log(value)
};

struct RuleDefaults {
  static constexpr constant int numbers = 0;  // hyper-parameters
  static constexpr constant int states = 0;
  static constexpr constant bool reads_learning_rate = true;
  static constexpr constant bool reads_step = false;
  static constexpr constant bool reads_parameter = true;
  static constexpr constant bool writes_parameter = true;
  static constexpr constant bool writes_gradient = false;
};

METAL_FUNC float square_root(float x) { return metal::precise::sqrt(x); }

METAL_FUNC float magnitude(float x) { return metal::abs(x); }

METAL_FUNC float sign_of(float x) { return float(x > 0) - float(x < 0); }

// The maximum, and not a number if either is none.
METAL_FUNC float larger(float a, float b) { return a >= b || a != a ? a : b; }

METAL_FUNC float smaller(float a, float b) { return a < b ? a : b; }

METAL_FUNC float power(float a, float b) { return metal::precise::pow(a, b); }

// 1 - beta^step for a beta below 1, to float32's accuracy for any beta: as
// -expm1(x) with x = step * log(beta). Near zero that is its Taylor series,
// whose next term is below 1e-9 of the sum; elsewhere nothing cancels.
METAL_FUNC float one_minus_power(Number<float> beta, float step) {
  const float x = step * beta.logarithm;
  if (x < -0.35f) {
    return 1 - metal::precise::exp(x);
  }
  float series = 1;
  for (int n = 9; n > 1; --n) {
    series = 1 + x * (1 / float(n)) * series;
  }
  return -(x * series);
}

// An exponential moving average takes in a new value.
template <typename T>
METAL_FUNC T moving_average(Number<T> beta, T average, T value) {
  return beta.value * average + beta.complement * value;
}

// Stochastic gradient descent without momentum.
RULE(SGD) {
  HYPERPARAMETERS(weight_decay);

  T learning_rate;

  void prepare(T rate, T step) thread { learning_rate = rate; }

  void update(thread T & g, thread T & p, thread T * s) const thread {
    if (weight_decay.value != 0) {
      g = g + weight_decay.value * p;
    }
    p = p - learning_rate * g;
  }
};

// Stochastic gradient descent with (Nesterov) momentum.
// Sutskever et al., "On the importance of initialization and momentum in deep
// learning", ICML 2013.
RULE(Momentum) {
  HYPERPARAMETERS(momentum, dampening, weight_decay, nesterov);
  STATES(v);

  T learning_rate;

  void prepare(T rate, T step) thread { learning_rate = rate; }

  void update(thread T & g, thread T & p, thread T * s) const thread {
    thread T& v = s[0];
    if (weight_decay.value != 0) {
      g = g + weight_decay.value * p;
    }
    v = momentum.value * v + dampening.complement * g;
    if (nesterov.value != 0) {
      p = p - learning_rate * (g + momentum.value * v);
    } else {
      p = p - learning_rate * v;
    }
  }
};

// Adam, and AdamW when weight_decay is not 0, without bias correction.
// Kingma and Ba, "Adam: A method for stochastic optimization", ICLR 2015;
// Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019.
RULE(Adam) {
  HYPERPARAMETERS(beta1, beta2, eps, weight_decay);
  STATES(m, v);
  NON_NEGATIVE(v);

  T learning_rate;
  T retained;  // what decay leaves of p

  void prepare(T rate, T step) thread {
    learning_rate = rate;
    retained = 1 - rate * weight_decay.value;
  }

  void update(thread T & g, thread T & p, thread T * s) const thread {
    thread T& m = s[0];
    thread T& v = s[1];
    m = moving_average(beta1, m, g);
    v = moving_average(beta2, v, g * g);
    p = p * retained - learning_rate * m / (square_root(v) + eps.value);
  }
};

// The same with bias correction.
RULE(AdamBiasCorrected) {
  static constexpr constant bool reads_step = true;
  HYPERPARAMETERS(beta1, beta2, eps, weight_decay);
  STATES(m, v);
  NON_NEGATIVE(v);

  T retained;            // what decay leaves of p
  T step_size;           // learning_rate / (1 - beta1^step)
  T inverse_correction;  // 1 / sqrt(1 - beta2^step)

  void prepare(T rate, T step) thread {
    retained = 1 - rate * weight_decay.value;
    step_size = rate / one_minus_power(beta1, step);
    inverse_correction = 1 / square_root(one_minus_power(beta2, step));
  }

  void update(thread T & g, thread T & p, thread T * s) const thread {
    thread T& m = s[0];
    thread T& v = s[1];
    m = moving_average(beta1, m, g);
    v = moving_average(beta2, v, g * g);
    p = p * retained -
        step_size * m / (square_root(v) * inverse_correction + eps.value);
  }
};

// AdEMAMix with AdamW's decay: a second, slow average of the gradient is added
// to the first. beta3 and alpha grow over `warmup` steps, beta3 such that the
// half-life of its average grows linearly; 0 is no warm-up.
// Pagliardini, Ablin and Grangier, "The AdEMAMix optimizer: better, faster,
// older", arXiv:2409.03137, algorithm 1.
RULE(AdEMAMix) {
  static constexpr constant bool reads_step = true;
  HYPERPARAMETERS(beta1, beta2, beta3, alpha, eps, weight_decay, warmup);
  STATES(m1, m2, v);
  NON_NEGATIVE(v);

  T learning_rate;
  T retained;            // what decay leaves of p
  T scale1;              // 1 / (1 - beta1^step)
  T inverse_correction;  // 1 / sqrt(1 - beta2^step)
  T slow_rate;           // 1 - beta3 of this step
  T slow_weight;         // alpha of this step

  void prepare(T rate, T step) thread {
    learning_rate = rate;
    retained = 1 - rate * weight_decay.value;
    scale1 = 1 / one_minus_power(beta1, step);
    inverse_correction = 1 / square_root(one_minus_power(beta2, step));
    slow_rate = beta3.complement;
    slow_weight = alpha.value;
    if (warmup.value != 0) {
      const T progress = smaller(step / warmup.value, 1);
      // log(beta3) of this step, by 1 / log(beta) growing linearly.
      Number<T> beta;
      beta.logarithm =
          beta1.logarithm * beta3.logarithm /
          ((1 - progress) * beta3.logarithm + progress * beta1.logarithm);
      slow_rate = one_minus_power(beta, 1);
      slow_weight = alpha.value * progress;
    }
  }

  void update(thread T & g, thread T & p, thread T * s) const thread {
    thread T& m1 = s[0];
    thread T& m2 = s[1];
    thread T& v = s[2];
    m1 = moving_average(beta1, m1, g);
    m2 = (1 - slow_rate) * m2 + slow_rate * g;
    v = moving_average(beta2, v, g * g);
    p = p * retained - learning_rate * (m1 * scale1 + slow_weight * m2) /
                           (square_root(v) * inverse_correction + eps.value);
  }
};

// Lion.
// Chen et al., "Symbolic discovery of optimization algorithms",
// arXiv:2302.06675.
RULE(Lion) {
  HYPERPARAMETERS(beta1, beta2, weight_decay);
  STATES(m);

  T learning_rate;
  T retained;  // what decay leaves of p

  void prepare(T rate, T step) thread {
    learning_rate = rate;
    retained = 1 - rate * weight_decay.value;
  }

  void update(thread T & g, thread T & p, thread T * s) const thread {
    thread T& m = s[0];
    const T c = moving_average(beta1, m, g);
    m = moving_average(beta2, m, g);
    p = p * retained - learning_rate * sign_of(c);
  }
};

// RMSprop.
// Tieleman and Hinton, "Lecture 6.5: rmsprop", Neural networks for machine
// learning, 2012.
RULE(RMSprop) {
  HYPERPARAMETERS(alpha, eps);
  STATES(v);
  NON_NEGATIVE(v);

  T learning_rate;

  void prepare(T rate, T step) thread { learning_rate = rate; }

  void update(thread T & g, thread T & p, thread T * s) const thread {
    thread T& v = s[0];
    v = moving_average(alpha, v, g * g);
    p = p - learning_rate * g / (square_root(v) + eps.value);
  }
};

// Adagrad.
// Duchi, Hazan and Singer, "Adaptive subgradient methods for online learning
// and stochastic optimization", JMLR 2011.
RULE(Adagrad) {
  HYPERPARAMETERS(eps);
  STATES(v);
  NON_NEGATIVE(v);

  T learning_rate;

  void prepare(T rate, T step) thread { learning_rate = rate; }

  void update(thread T & g, thread T & p, thread T * s) const thread {
    thread T& v = s[0];
    v = v + g * g;
    p = p - learning_rate * g / (square_root(v) + eps.value);
  }
};

// AdaDelta with a learning rate.
// Zeiler, "ADADELTA: an adaptive learning rate method", arXiv:1212.5701.
RULE(AdaDelta) {
  HYPERPARAMETERS(rho, eps);
  STATES(v, u);
  NON_NEGATIVE(v, u);

  T learning_rate;

  void prepare(T rate, T step) thread { learning_rate = rate; }

  void update(thread T & g, thread T & p, thread T * s) const thread {
    thread T& v = s[0];
    thread T& u = s[1];
    v = moving_average(rho, v, g * g);
    const T d = square_root(u + eps.value) / square_root(v + eps.value) * g;
    u = moving_average(rho, u, d * d);
    p = p - learning_rate * d;
  }
};

// Adamax.
// Kingma and Ba, "Adam: A method for stochastic optimization", ICLR 2015,
// section 7.1.
RULE(Adamax) {
  HYPERPARAMETERS(beta1, beta2, eps);
  STATES(m, v);
  NON_NEGATIVE(v);

  T learning_rate;

  void prepare(T rate, T step) thread { learning_rate = rate; }

  void update(thread T & g, thread T & p, thread T * s) const thread {
    thread T& m = s[0];
    thread T& v = s[1];
    m = moving_average(beta1, m, g);
    v = larger(beta2.value * v, magnitude(g));
    p = p - learning_rate * m / (v + eps.value);
  }
};

// The direction of Adafactor's update.
template <typename T>
METAL_FUNC T direction(T row_factor, T column_factor, T g) {
  return row_factor * column_factor * g;
}

// Adafactor: no rule of one element, but the parts of one. The second moment of
// a matrix is the product of its rows' means and its columns'. Three passes put
// the parts together: metal/factored.metal, csrc/cpu/factored.cpp, and
// csrc/graph/factored.cpp for plain operations. A vector is a matrix of one
// row, which has no mean and the factor 1.
// Shazeer and Stern, "Adafactor: Adaptive learning rates with sublinear memory
// cost", ICML 2018, algorithm 4.
template <typename T>
struct Adafactor {
  HYPERPARAMETERS(
      eps,
      least_scale,
      clip_threshold,
      decay_rate,
      beta1,
      weight_decay,
      scale_parameter,
      relative_step,
      warmup_init);

  T rate;
  T weight;  // of this step's squares in the running means

  void prepare(T learning_rate, T step) thread {
    rate = learning_rate;
    if (relative_step.value != 0) {
      T most = T(1e-2f);
      if (warmup_init.value != 0) {
        most = T(1e-6f) * step;
      }
      rate = smaller(most, 1 / square_root(step));
    }
    weight = power(step, decay_rate.value);
  }

  // A row's or column's mean of squares, averaged over the steps.
  T running_mean(T before, T mean) const thread {
    return (1 - weight) * before + weight * (mean + eps.value);
  }

  // What it makes of its gradients; for a row's times the root of the mean of
  // the matrix' rows.
  T factor(T running_mean) const thread {
    return 1 / square_root(running_mean);
  }

  // The step size, by the mean of the parameter's squares.
  T scaled_rate(T parameter_square) const thread {
    if (scale_parameter.value != 0) {
      return rate * larger(square_root(parameter_square), least_scale.value);
    }
    return rate;
  }

  // The same after clipping, by the mean of the direction's squares.
  T clipped(T scaled_rate, T direction_square) const thread {
    const T excess = square_root(direction_square) / clip_threshold.value;
    return scaled_rate / larger(excess, T(1));
  }

  // The first moment takes the update's place.
  void average(thread T& u, thread T& exp_avg) const thread {
    exp_avg = moving_average(beta1, exp_avg, u);
    u = exp_avg;
  }

  void write(T u, T scaled_rate, thread T& p) const thread {
    if (weight_decay.value != 0) {
      p = p - p * (weight_decay.value * scaled_rate);
    }
    p = p - u;
  }
};

// The beginning of a Muon step: the gradient becomes the direction that is then
// made orthogonal. Jordan, "Muon: An optimizer for hidden layers in neural
// networks", 2024.
RULE(MuonMoment) {
  static constexpr constant bool reads_learning_rate = false;
  static constexpr constant bool writes_parameter = false;
  static constexpr constant bool writes_gradient = true;
  HYPERPARAMETERS(momentum, weight_decay, nesterov);
  STATES(v);

  void prepare(T rate, T step) thread {}

  void update(thread T & g, thread T & p, thread T * s) const thread {
    thread T& v = s[0];
    if (weight_decay.value != 0) {
      g = g + weight_decay.value * p;
    }
    v = moving_average(momentum, v, g);
    if (nesterov.value != 0) {
      g = g * momentum.complement + v * momentum.value;
    } else {
      g = v;
    }
  }
};

// Multiplies the gradient by the gradient scale and no more: the second half
// of clip_grad_norm.
RULE(Scale) {
  static constexpr constant bool reads_learning_rate = false;
  static constexpr constant bool reads_parameter = false;
  static constexpr constant bool writes_parameter = false;
  static constexpr constant bool writes_gradient = true;

  void prepare(T rate, T step) thread {}

  void update(thread T & g, thread T & p, thread T * s) const thread {}
};
