// The arithmetic of every optimizer, on float registers.
//
// This file is written in the language that the Metal Shading Language and
// C++20 share; csrc/rules.h compiles it for the CPU. A rule is its
// hyper-parameters and one function. It never sees a pointer into an array or
// a dtype: loading, storing and rounding belong to the schedules
// (fused_update.metal, csrc/cpu/loops.cpp).
//
//   prepare(h, learning_rate, step)  once a launch: the rule of this step, from
//                                    the hyper-parameters h (their order is
//                                    that of the fields) and the two scalars
//   update(g, p, s)                  once an element: gradient g changes the
//                                    parameter p and its states s[0], s[1]
//
// The schedule multiplies the gradient by the gradient scale first: g, or p for
// the rules whose gradient_in_place says that they change the gradient itself.
//
// Operations stand in the order in which mlx.optimizers does them, so float32
// results agree to the last bits. Pairs such as beta1 and 1 - beta1 come as two
// hyper-parameters because Python rounds each of them from float64.

// Stochastic gradient descent without momentum.
struct SGD {
  static constexpr constant int states = 0;
  static constexpr constant bool reads_gradient = true;
  static constexpr constant bool gradient_in_place = false;
  static constexpr constant int hyperparameters = 1;

  float weight_decay;
  float learning_rate;

  static SGD prepare(constant float* h, float learning_rate, float step) {
    SGD rule;
    rule.weight_decay = h[0];
    rule.learning_rate = learning_rate;
    return rule;
  }

  void update(float g, thread float& p, thread float* s) const thread {
    if (weight_decay != 0) {
      g = g + weight_decay * p;
    }
    p = p - learning_rate * g;
  }
};

// Stochastic gradient descent with (Nesterov) momentum; s[0] is v.
// Sutskever et al., "On the importance of initialization and momentum in deep
// learning", ICML 2013.
struct Momentum {
  static constexpr constant int states = 1;
  static constexpr constant bool reads_gradient = true;
  static constexpr constant bool gradient_in_place = false;
  static constexpr constant int hyperparameters = 4;

  float momentum;
  float one_minus_dampening;
  float weight_decay;
  float nesterov;  // 0 or 1
  float learning_rate;

  static Momentum prepare(constant float* h, float learning_rate, float step) {
    Momentum rule;
    rule.momentum = h[0];
    rule.one_minus_dampening = h[1];
    rule.weight_decay = h[2];
    rule.nesterov = h[3];
    rule.learning_rate = learning_rate;
    return rule;
  }

  void update(float g, thread float& p, thread float* s) const thread {
    if (weight_decay != 0) {
      g = g + weight_decay * p;
    }
    const float v = momentum * s[0] + one_minus_dampening * g;
    s[0] = v;
    p = p - learning_rate * (nesterov != 0 ? g + momentum * v : v);
  }
};

// Adam, and AdamW when weight_decay is not 0; s[0] is m, s[1] is v.
// Kingma and Ba, "Adam: A method for stochastic optimization", ICLR 2015;
// Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019.
struct Adam {
  static constexpr constant int states = 2;
  static constexpr constant bool reads_gradient = true;
  static constexpr constant bool gradient_in_place = false;
  static constexpr constant int hyperparameters = 7;

  float beta1;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float eps;
  float retained;   // what decay leaves of p: 1 - learning_rate * weight_decay
  float step_size;  // learning_rate / (1 - beta1^step)
  float denominator_scale;  // 1 / sqrt(1 - beta2^step)

  static Adam prepare(constant float* h, float learning_rate, float step) {
    Adam rule;
    rule.beta1 = h[0];
    rule.one_minus_beta1 = h[1];
    rule.beta2 = h[2];
    rule.one_minus_beta2 = h[3];
    rule.eps = h[4];
    rule.retained = 1 - learning_rate * h[5];
    rule.step_size = learning_rate;
    rule.denominator_scale = 1;
    const bool bias_correction = h[6] != 0;
    if (bias_correction) {
      rule.step_size = learning_rate / (1 - metal::pow(h[0], step));
      rule.denominator_scale =
          1 / metal::precise::sqrt(1 - metal::pow(h[2], step));
    }
    return rule;
  }

  void update(float g, thread float& p, thread float* s) const thread {
    const float m = beta1 * s[0] + one_minus_beta1 * g;
    const float v = beta2 * s[1] + one_minus_beta2 * (g * g);
    s[0] = m;
    s[1] = v;
    const float denominator = metal::precise::sqrt(v) * denominator_scale + eps;
    p = p * retained - step_size * m / denominator;
  }
};

// Lion; s[0] is m.
// Chen et al., "Symbolic discovery of optimization algorithms",
// arXiv:2302.06675.
struct Lion {
  static constexpr constant int states = 1;
  static constexpr constant bool reads_gradient = true;
  static constexpr constant bool gradient_in_place = false;
  static constexpr constant int hyperparameters = 5;

  float beta1;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float retained;  // what decay leaves of p: 1 - learning_rate * weight_decay
  float learning_rate;

  static Lion prepare(constant float* h, float learning_rate, float step) {
    Lion rule;
    rule.beta1 = h[0];
    rule.one_minus_beta1 = h[1];
    rule.beta2 = h[2];
    rule.one_minus_beta2 = h[3];
    rule.retained = 1 - learning_rate * h[4];
    rule.learning_rate = learning_rate;
    return rule;
  }

  void update(float g, thread float& p, thread float* s) const thread {
    const float c = beta1 * s[0] + one_minus_beta1 * g;
    s[0] = beta2 * s[0] + one_minus_beta2 * g;
    const float sign = float(c > 0) - float(c < 0);
    p = p * retained - learning_rate * sign;
  }
};

// RMSprop; s[0] is v.
// Tieleman and Hinton, "Lecture 6.5: rmsprop", Neural networks for machine
// learning, 2012.
struct RMSprop {
  static constexpr constant int states = 1;
  static constexpr constant bool reads_gradient = true;
  static constexpr constant bool gradient_in_place = false;
  static constexpr constant int hyperparameters = 3;

  float alpha;
  float one_minus_alpha;
  float eps;
  float learning_rate;

  static RMSprop prepare(constant float* h, float learning_rate, float step) {
    RMSprop rule;
    rule.alpha = h[0];
    rule.one_minus_alpha = h[1];
    rule.eps = h[2];
    rule.learning_rate = learning_rate;
    return rule;
  }

  void update(float g, thread float& p, thread float* s) const thread {
    const float v = alpha * s[0] + one_minus_alpha * (g * g);
    s[0] = v;
    p = p - learning_rate * g / (metal::precise::sqrt(v) + eps);
  }
};

// Adagrad; s[0] is v.
// Duchi, Hazan and Singer, "Adaptive subgradient methods for online learning
// and stochastic optimization", JMLR 2011.
struct Adagrad {
  static constexpr constant int states = 1;
  static constexpr constant bool reads_gradient = true;
  static constexpr constant bool gradient_in_place = false;
  static constexpr constant int hyperparameters = 1;

  float eps;
  float learning_rate;

  static Adagrad prepare(constant float* h, float learning_rate, float step) {
    Adagrad rule;
    rule.eps = h[0];
    rule.learning_rate = learning_rate;
    return rule;
  }

  void update(float g, thread float& p, thread float* s) const thread {
    const float v = s[0] + g * g;
    s[0] = v;
    p = p - learning_rate * g / (metal::precise::sqrt(v) + eps);
  }
};

// AdaDelta with a learning rate; s[0] is v, s[1] is u.
// Zeiler, "ADADELTA: an adaptive learning rate method", arXiv:1212.5701.
struct AdaDelta {
  static constexpr constant int states = 2;
  static constexpr constant bool reads_gradient = true;
  static constexpr constant bool gradient_in_place = false;
  static constexpr constant int hyperparameters = 3;

  float rho;
  float one_minus_rho;
  float eps;
  float learning_rate;

  static AdaDelta prepare(constant float* h, float learning_rate, float step) {
    AdaDelta rule;
    rule.rho = h[0];
    rule.one_minus_rho = h[1];
    rule.eps = h[2];
    rule.learning_rate = learning_rate;
    return rule;
  }

  void update(float g, thread float& p, thread float* s) const thread {
    const float v = rho * s[0] + one_minus_rho * (g * g);
    const float d =
        metal::precise::sqrt(s[1] + eps) / metal::precise::sqrt(v + eps) * g;
    s[0] = v;
    s[1] = rho * s[1] + one_minus_rho * (d * d);
    p = p - learning_rate * d;
  }
};

// Adamax; s[0] is m, s[1] is v.
// Kingma and Ba, "Adam: A method for stochastic optimization", ICLR 2015,
// section 7.1.
struct Adamax {
  static constexpr constant int states = 2;
  static constexpr constant bool reads_gradient = true;
  static constexpr constant bool gradient_in_place = false;
  static constexpr constant int hyperparameters = 4;

  float beta1;
  float one_minus_beta1;
  float beta2;
  float eps;
  float learning_rate;

  static Adamax prepare(constant float* h, float learning_rate, float step) {
    Adamax rule;
    rule.beta1 = h[0];
    rule.one_minus_beta1 = h[1];
    rule.beta2 = h[2];
    rule.eps = h[3];
    rule.learning_rate = learning_rate;
    return rule;
  }

  void update(float g, thread float& p, thread float* s) const thread {
    const float m = beta1 * s[0] + one_minus_beta1 * g;
    const float decayed = beta2 * s[1];
    const float magnitude = metal::abs(g);
    // The maximum, and not a number if either is none.
    const float v =
        decayed >= magnitude || decayed != decayed ? decayed : magnitude;
    s[0] = m;
    s[1] = v;
    p = p - learning_rate * m / (v + eps);
  }
};

// The end of an Adafactor step, in which g is the factored update, gradient
// scale the step size over its clipped root mean square, and learning_rate the
// parameter's own; s[0] is the first moment.
// Shazeer and Stern, "Adafactor: Adaptive learning rates with sublinear memory
// cost", ICML 2018, algorithm 4.
struct AdafactorWithMoment {
  static constexpr constant int states = 1;
  static constexpr constant bool reads_gradient = true;
  static constexpr constant bool gradient_in_place = false;
  static constexpr constant int hyperparameters = 3;

  float beta1;
  float one_minus_beta1;
  float decay;

  static AdafactorWithMoment prepare(constant float* h, float learning_rate,
                                     float step) {
    AdafactorWithMoment rule;
    rule.beta1 = h[0];
    rule.one_minus_beta1 = h[1];
    rule.decay = h[2] * learning_rate;
    return rule;
  }

  void update(float g, thread float& p, thread float* s) const thread {
    s[0] = beta1 * s[0] + one_minus_beta1 * g;
    p = p - p * decay - s[0];
  }
};

// The same without first moment.
struct Adafactor {
  static constexpr constant int states = 0;
  static constexpr constant bool reads_gradient = true;
  static constexpr constant bool gradient_in_place = false;
  static constexpr constant int hyperparameters = 1;

  float decay;

  static Adafactor prepare(constant float* h, float learning_rate, float step) {
    Adafactor rule;
    rule.decay = h[0] * learning_rate;
    return rule;
  }

  void update(float g, thread float& p, thread float* s) const thread {
    p = p - p * decay - g;
  }
};

// The beginning of a Muon step: p is the gradient, which becomes the update
// that is then made orthogonal; g is the parameter, which is only read; s[0] is
// v. Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024.
struct MuonMoment {
  static constexpr constant int states = 1;
  static constexpr constant bool reads_gradient = true;
  static constexpr constant bool gradient_in_place = true;
  static constexpr constant int hyperparameters = 4;

  float momentum;
  float one_minus_momentum;
  float weight_decay;
  float nesterov;  // 0 or 1

  static MuonMoment prepare(constant float* h, float learning_rate,
                            float step) {
    MuonMoment rule;
    rule.momentum = h[0];
    rule.one_minus_momentum = h[1];
    rule.weight_decay = h[2];
    rule.nesterov = h[3];
    return rule;
  }

  void update(float g, thread float& p, thread float* s) const thread {
    float gradient = p;
    if (weight_decay != 0) {
      gradient = gradient + weight_decay * g;
    }
    const float v = momentum * s[0] + one_minus_momentum * gradient;
    s[0] = v;
    p = nesterov != 0 ? gradient * one_minus_momentum + v * momentum : v;
  }
};

// Multiplies by the gradient scale and no more: the second half of
// clip_grad_norm.
struct Scale {
  static constexpr constant int states = 0;
  static constexpr constant bool reads_gradient = false;
  static constexpr constant bool gradient_in_place = true;
  static constexpr constant int hyperparameters = 0;

  static Scale prepare(constant float* h, float learning_rate, float step) {
    return Scale();
  }

  void update(float g, thread float& p, thread float* s) const thread {}
};
