// The vectorised loops over blocks of contiguous elements, one set for each
// instruction set that the machine may have.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/program_code.h"
#include "rules.h"

namespace mlx_fused::cpu {

// Elements that are loaded, updated and stored at a time: few enough for all
// arrays of a rule to stay in the first-level cache as float32.
constexpr size_t block_size = 512;

// Lanes of the sum of squares. Fixed, so that every instruction set adds in the
// same order.
constexpr size_t sum_lanes = 32;

// Fetches bytes into the cache. The hardware does so on its own, but begins
// anew in each page of 4 KiB of each array: with this a step takes 10 to 20 %
// less time.
inline __attribute__((always_inline)) void prefetch(const void* data,
                                                    size_t bytes) {
  constexpr size_t line = 64;
  for (size_t offset = 0; offset < bytes; offset += line) {
    __builtin_prefetch(static_cast<const char*>(data) + offset);
  }
}

// Where elements of a tensor's slots are read and written, perhaps in the same
// memory. By slots; null for what a rule does not have or write.
template <typename T>
struct Block {
  const T* in[max_slots] = {};
  T* out[max_slots] = {};
  // What is read next lies so many elements further on: it is fetched ahead.
  size_t ahead = 2048 / sizeof(T);

  // What begins with that element.
  Block from(size_t start) const {
    Block block = *this;
    for (int k = 0; k < max_slots; ++k) {
      block.in[k] += block.in[k] ? start : 0;
      block.out[k] += block.out[k] ? start : 0;
    }
    return block;
  }
};

// Updates n elements by the rule of that index, with its numbers (see
// rule_traits.h) and scalars.
template <typename T>
using Update = void (*)(int rule, const float* numbers, float learning_rate,
                        float step, float coefficient, float gradient_scale,
                        const Block<T>& block, size_t n);

// Where codes and their scales, or weights of half precision and their errors,
// are read or written.
struct Pair {
  char* values = nullptr;
  char* companions = nullptr;
};
struct CodesOrError {
  int bits;                // of a code or an error
  bool is_never_negative;  // of codes
  bool is_float16;         // of weights
};

// Arrays of a rule whose parameter is bfloat16 and an error of 8 bits, whose
// states are codes of 8 bits, and whose gradient is bfloat16. By slots.
struct Packed {
  static constexpr size_t block = 64;  // elements that share scales

  Pair in[max_slots] = {};
  Pair out[max_slots] = {};
  size_t ahead = 1024;     // as in Block
  bool is_turned = false;  // the gradient, which is in the cache then
};
// Updates whole blocks.
using UpdatePacked = void (*)(int rule, const float* numbers,
                              float learning_rate, float step,
                              float coefficient, float gradient_scale,
                              const Packed& arrays, size_t blocks);

// Part of a matrix' row in the last pass of Adafactor.
struct FactoredRow {
  const float* numbers;  // of the rule
  float factor;          // of the row
  const float* columns;  // factors
  const float* gradient;
  float size;         // that the direction is multiplied by
  float scaled_rate;  // that decay is
  const float* parameter;
  float* new_parameter;
  const float* moment;  // null if there is none
  float* new_moment;
};

struct Loops {
  const char* name;  // of the instruction set

  Update<float> update;
  Update<uint16_t> update_float16;
  Update<uint16_t> update_bfloat16;
  UpdatePacked update_packed;  // of rules that write a parameter
  // The next value of an average, by the numbers of its hyper-parameter.
  void (*average)(const float* numbers, const float* x, const float* in,
                  float* out, size_t n);
  // The same by a program, whose scalars these are.
  void (*run_program)(const ProgramCode& code, const float* numbers,
                      const float* scalars, float gradient_scale,
                      const Block<float>& block, int slots, size_t n);
  // Adds the squares of n values times scale to the lanes: in double precision,
  // so that the norm of some pieces is that of others, to the last bit.
  void (*add_squares)(const float* x, size_t n, float scale, double* lanes);
  // Adds 1 for each of n values that is not zero.
  void (*add_nonzero)(const float* x, size_t n, double* lanes);

  // The sum of n squares, each of which is added to its column too, if these
  // are given.
  double (*sum_squares)(const float* x, size_t n, double* columns);
  // The sum of squares of the direction of Adafactor's update.
  double (*sum_direction)(float row, const float* columns, const float* g,
                          size_t n);
  void (*write_factored)(const FactoredRow& row, size_t n);

  // Writes rows x columns elements of 2 or 4 bytes in row-major order: element
  // (row, column) is read from in + row + column * column_stride. The elements
  // from `next` on, if given, are fetched into the cache meanwhile: their rows
  // are too short for the hardware to foresee them.
  void (*turn)(size_t itemsize, const char* in, const char* next,
               int64_t column_stride, size_t rows, size_t columns, char* out);

  // At most block_size elements in a format of graph/layout.h, from the start
  // of a block of codes on.
  void (*load_codes)(CodesOrError kind, Pair from, float* out, size_t n);
  void (*store_codes)(CodesOrError kind, const float* in, Pair to, size_t n);
  void (*load_split)(CodesOrError kind, Pair from, float* out, size_t n);
  void (*store_split)(CodesOrError kind, const float* in, Pair to, size_t n);
  // Makes float32 such that storing it in this dtype rounds nothing more; the
  // first element has this number in its tensor.
  void (*round_stochastically)(bool is_float16, uint32_t key, uint64_t first,
                               float* values, size_t n);

  void (*load_float16)(const uint16_t* in, float* out, size_t n);
  void (*store_float16)(const float* in, uint16_t* out, size_t n);
  void (*load_bfloat16)(const uint16_t* in, float* out, size_t n);
  void (*store_bfloat16)(const float* in, uint16_t* out, size_t n);
};

// The fastest set that this machine runs.
const Loops& loops();

}  // namespace mlx_fused::cpu
