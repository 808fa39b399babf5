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
//                         that does not read one of the two must not use it;
//                         one that reads the coefficient, a number of its own
//                         that Python computes each step, takes a third.
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
  static constexpr constant bool reads_coefficient = false;
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

METAL_FUNC float where_positive(float x, float a, float b) {
  return x > 0 ? a : b;
}

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

// Adam and AdamW whose denominator never shrinks.
// Reddi, Kale and Kumar, "On the convergence of Adam and beyond", ICLR 2018.
RULE(AMSGrad) {
  static constexpr constant bool reads_step = true;
  HYPERPARAMETERS(beta1, beta2, eps, weight_decay, bias_correction);
  STATES(m, v, v_max);
  NON_NEGATIVE(v, v_max);

  T retained;  // what decay leaves of p
  T step_size;
  T inverse_correction;  // 1 / sqrt(1 - beta2^step)

  void prepare(T rate, T step) thread {
    retained = 1 - rate * weight_decay.value;
    step_size = rate;
    inverse_correction = 1;
    if (bias_correction.value != 0) {
      step_size = rate / one_minus_power(beta1, step);
      inverse_correction = 1 / square_root(one_minus_power(beta2, step));
    }
  }

  void update(thread T & g, thread T & p, thread T * s) const thread {
    thread T& m = s[0];
    thread T& v = s[1];
    thread T& v_max = s[2];
    m = moving_average(beta1, m, g);
    v = moving_average(beta2, v, g * g);
    v_max = larger(v_max, v);
    p = p * retained -
        step_size * m / (square_root(v_max) * inverse_correction + eps.value);
  }
};

// AdaBelief with AdamW's decay: small where gradients are as expected.
// Zhuang et al., "AdaBelief optimizer: adapting stepsizes by the belief in
// observed gradients", arXiv:2010.07468, algorithm 2.
RULE(AdaBelief) {
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
    const T surprise = g - m;
    v = moving_average(beta2, v, surprise * surprise) + eps.value;
    p = p * retained -
        step_size * m / (square_root(v) * inverse_correction + eps.value);
  }
};

// Adan: Nesterov momentum by the difference from the step before, which the
// first step has none of.
// Xie et al., "Adan: adaptive Nesterov momentum algorithm for faster optimizing
// deep models", arXiv:2208.06677, algorithm 1 with the authors' bias
// correction.
RULE(Adan) {
  static constexpr constant bool reads_step = true;
  HYPERPARAMETERS(beta1, beta2, beta3, eps, weight_decay, no_prox);
  STATES(m, d, v, previous);
  NON_NEGATIVE(v);

  T learning_rate;
  T before;  // decay multiplies p by these, before and after its update
  T after;
  T scale_m;             // 1 / (1 - beta1^step)
  T scale_d;             // beta2 / (1 - beta2^step)
  T inverse_correction;  // 1 / sqrt(1 - beta3^step)
  T has_previous;        // 0 in the first step, then 1

  void prepare(T rate, T step) thread {
    learning_rate = rate;
    const T decay = rate * weight_decay.value;
    before = 1;
    after = 1;
    if (no_prox.value != 0) {
      before = 1 - decay;
    } else {
      after = 1 / (1 + decay);
    }
    scale_m = 1 / one_minus_power(beta1, step);
    scale_d = beta2.value / one_minus_power(beta2, step);
    inverse_correction = 1 / square_root(one_minus_power(beta3, step));
    has_previous = smaller(step - 1, 1);
  }

  void update(thread T & g, thread T & p, thread T * s) const thread {
    thread T& m = s[0];
    thread T& d = s[1];
    thread T& v = s[2];
    thread T& previous = s[3];
    const T difference = has_previous * (g - previous);
    const T ahead = g + beta2.value * difference;
    m = moving_average(beta1, m, g);
    d = moving_average(beta2, d, difference);
    v = moving_average(beta3, v, ahead * ahead);
    previous = g;
    p = (p * before - learning_rate * (m * scale_m + d * scale_d) /
                          (square_root(v) * inverse_correction + eps.value)) *
        after;
  }
};

// NAdam. Its coefficient is 1 less the product of the momenta of all steps.
// Dozat, "Incorporating Nesterov momentum into Adam", ICLR workshop 2016.
RULE(NAdam) {
  static constexpr constant bool reads_step = true;
  static constexpr constant bool reads_coefficient = true;
  HYPERPARAMETERS(
      beta1, beta2, eps, weight_decay, momentum_decay, decoupled_weight_decay);
  STATES(m, v);
  NON_NEGATIVE(v);

  T coupled;   // decay that is part of the gradient
  T retained;  // what other decay leaves of p
  T gradient_size;
  T moment_size;
  T inverse_correction;  // 1 / sqrt(1 - beta2^step)

  void prepare(T rate, T step, T coefficient) thread {
    coupled = weight_decay.value;
    retained = 1;
    if (decoupled_weight_decay.value != 0) {
      coupled = 0;
      retained = 1 - rate * weight_decay.value;
    }
    const T decay = power(T(0.96f), step * momentum_decay.value);
    const T next_decay = power(T(0.96f), (step + 1) * momentum_decay.value);
    const T momentum = beta1.value * (1 - T(0.5f) * decay);
    const T next = beta1.value * (1 - T(0.5f) * next_decay);
    gradient_size = rate * (1 - momentum) / coefficient;
    moment_size = rate * next / (coefficient + (1 - coefficient) * (1 - next));
    inverse_correction = 1 / square_root(one_minus_power(beta2, step));
  }

  void update(thread T & g, thread T & p, thread T * s) const thread {
    thread T& m = s[0];
    thread T& v = s[1];
    if (weight_decay.value != 0) {
      g = g + coupled * p;
    }
    m = moving_average(beta1, m, g);
    v = moving_average(beta2, v, g * g);
    p = p * retained - (gradient_size * g + moment_size * m) /
                           (square_root(v) * inverse_correction + eps.value);
  }
};

// RAdam. Its coefficient is the rectification, or 0 in the first steps, which
// divide by no second moment.
// Liu et al., "On the variance of the adaptive learning rate and beyond",
// arXiv:1908.03265, algorithm 2.
RULE(RAdam) {
  static constexpr constant bool reads_step = true;
  static constexpr constant bool reads_coefficient = true;
  HYPERPARAMETERS(beta1, beta2, eps, weight_decay, decoupled_weight_decay);
  STATES(m, v);
  NON_NEGATIVE(v);

  T coupled;        // decay that is part of the gradient
  T retained;       // what other decay leaves of p
  T step_size;      // rectification * learning_rate / (1 - beta1^step)
  T root_factor;    // 1 / sqrt(1 - beta2^step), or 0
  T constant_part;  // of the denominator: 0, or 1

  void prepare(T rate, T step, T coefficient) thread {
    coupled = weight_decay.value;
    retained = 1;
    if (decoupled_weight_decay.value != 0) {
      coupled = 0;
      retained = 1 - rate * weight_decay.value;
    }
    const T is_rectified = sign_of(coefficient);
    constant_part = 1 - is_rectified;
    step_size =
        rate * (coefficient + constant_part) / one_minus_power(beta1, step);
    root_factor = is_rectified / square_root(one_minus_power(beta2, step));
  }

  void update(thread T & g, thread T & p, thread T * s) const thread {
    thread T& m = s[0];
    thread T& v = s[1];
    if (weight_decay.value != 0) {
      g = g + coupled * p;
    }
    m = moving_average(beta1, m, g);
    v = moving_average(beta2, v, g * g);
    p = p * retained -
        step_size * m /
            ((square_root(v) + eps.value) * root_factor + constant_part);
  }
};

// Schedule-free SGD. The parameter is y, where gradients are taken; z is the
// sequence of SGD. The coefficient is the weight of z in their average x.
// Defazio et al., "The road less scheduled", arXiv:2405.15682.
RULE(ScheduleFreeSGD) {
  static constexpr constant bool reads_coefficient = true;
  HYPERPARAMETERS(momentum, weight_decay);
  STATES(z);

  T learning_rate;
  T weight;
  T reach;  // of the gradient in y

  void prepare(T rate, T step, T coefficient) thread {
    learning_rate = rate;
    weight = coefficient;
    reach = rate * (momentum.complement + momentum.value * coefficient);
  }

  void update(thread T & g, thread T & p, thread T * s) const thread {
    thread T& z = s[0];
    if (weight_decay.value != 0) {
      g = g + weight_decay.value * p;
    }
    p = p + weight * (z - p) - reach * g;
    z = z - learning_rate * g;
  }
};

// Schedule-free AdamW: the same with Adam's second moment.
RULE(ScheduleFreeAdamW) {
  static constexpr constant bool reads_step = true;
  static constexpr constant bool reads_coefficient = true;
  HYPERPARAMETERS(beta1, beta2, eps, weight_decay);
  STATES(z, v);
  NON_NEGATIVE(v);

  T learning_rate;
  T weight;
  T reach;               // of the update in y
  T inverse_correction;  // 1 / sqrt(1 - beta2^step)

  void prepare(T rate, T step, T coefficient) thread {
    learning_rate = rate;
    weight = coefficient;
    reach = rate * (beta1.complement + beta1.value * coefficient);
    inverse_correction = 1 / square_root(one_minus_power(beta2, step));
  }

  void update(thread T & g, thread T & p, thread T * s) const thread {
    thread T& z = s[0];
    thread T& v = s[1];
    v = moving_average(beta2, v, g * g);
    T u = g / (square_root(v) * inverse_correction + eps.value);
    if (weight_decay.value != 0) {
      u = u + weight_decay.value * p;
    }
    p = p + weight * (z - p) - reach * u;
    z = z - learning_rate * u;
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

// 1 where an update has the gradient's sign, and 0 elsewhere.
// Liang et al., "Cautious optimizers", arXiv:2411.16085, algorithm 1.
template <typename T>
METAL_FUNC T agreement(T update, T g) {
  return larger(sign_of(update) * sign_of(g), T(0));
}

// The beginning of a step of LAMB and of cautious Adam, whose size depends on
// the whole update: it takes the gradient's place. Descent is the end.
// You et al., "Large batch optimization for deep learning: training BERT in 76
// minutes", arXiv:1904.00962, algorithm 2.
RULE(AdamDirection) {
  static constexpr constant bool reads_learning_rate = false;
  static constexpr constant bool reads_step = true;
  static constexpr constant bool writes_parameter = false;
  static constexpr constant bool writes_gradient = true;
  HYPERPARAMETERS(beta1, beta2, eps, weight_decay, bias_correction, cautious);
  STATES(m, v);
  NON_NEGATIVE(v);

  T scale;               // 1 / (1 - beta1^step)
  T inverse_correction;  // 1 / sqrt(1 - beta2^step)

  void prepare(T rate, T step) thread {
    scale = 1;
    inverse_correction = 1;
    if (bias_correction.value != 0) {
      scale = 1 / one_minus_power(beta1, step);
      inverse_correction = 1 / square_root(one_minus_power(beta2, step));
    }
  }

  void update(thread T & g, thread T & p, thread T * s) const thread {
    thread T& m = s[0];
    thread T& v = s[1];
    m = moving_average(beta1, m, g);
    v = moving_average(beta2, v, g * g);
    T u = scale * m / (square_root(v) * inverse_correction + eps.value);
    if (cautious.value != 0) {
      u = u * agreement(m, g);
    }
    if (weight_decay.value != 0) {
      u = u + weight_decay.value * p;
    }
    g = u;
  }
};

// The same of cautious Lion.
RULE(LionDirection) {
  static constexpr constant bool reads_learning_rate = false;
  static constexpr constant bool writes_parameter = false;
  static constexpr constant bool writes_gradient = true;
  HYPERPARAMETERS(beta1, beta2);
  STATES(m);

  void prepare(T rate, T step) thread {}

  void update(thread T & g, thread T & p, thread T * s) const thread {
    thread T& m = s[0];
    const T c = moving_average(beta1, m, g);
    m = moving_average(beta2, m, g);
    g = sign_of(c) * agreement(c, g);
  }
};

// The end of these steps: writes the update that stands in the gradient's
// place, times the learning rate and the coefficient, that of the whole tensor.
RULE(Descent) {
  static constexpr constant bool reads_coefficient = true;
  HYPERPARAMETERS(weight_decay);

  T size;
  T retained;  // what decay leaves of p

  void prepare(T rate, T step, T coefficient) thread {
    size = rate * coefficient;
    retained = 1 - rate * weight_decay.value;
  }

  void update(thread T & g, thread T & p, thread T * s) const thread {
    p = p * retained - size * g;
  }
};

// Adds a gradient to the sum of those before it, which `step` counts; at 0 it
// begins a new sum, whatever the old one holds.
RULE(GradientSum) {
  static constexpr constant bool reads_step = true;
  static constexpr constant bool reads_learning_rate = false;
  static constexpr constant bool reads_parameter = false;
  static constexpr constant bool writes_parameter = false;
  STATES(gradient_sum);

  T count;

  void prepare(T rate, T step) thread { count = step; }

  void update(thread T & g, thread T & p, thread T * s) const thread {
    s[0] = where_positive(count, s[0] + g, g);
  }
};

// An average of the weights on its own, where the rule that changes them keeps
// none: the new weight stands in the gradient's place.
RULE(WeightAverage) {
  static constexpr constant bool reads_learning_rate = false;
  static constexpr constant bool reads_parameter = false;
  static constexpr constant bool writes_parameter = false;
  HYPERPARAMETERS(ema);
  STATES(weight_average);

  void prepare(T rate, T step) thread {}

  void update(thread T & g, thread T & p, thread T * s) const thread {
    s[0] = moving_average(ema, s[0], g);
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
