// Matrices in column-major order, turned to row-major order.
#pragma once

#include <utility>

#include "cpu/vectors.h"

namespace mlx_fused::cpu {

namespace {

// Elements of 32 bits in a register. A square of as many is turned in them; of
// 16 bits, one of twice as many: pairs of two columns' elements are turned.
#if defined(__AVX512F__)
constexpr size_t lanes = 16;
#elif defined(__AVX2__)
constexpr size_t lanes = 8;
#else
constexpr size_t lanes = 4;
#endif

template <typename T>
using Register __attribute__((vector_size(lanes * sizeof(uint32_t)))) = T;

template <typename T>
constexpr size_t square = lanes * sizeof(uint32_t) / sizeof(T);

// Exchanges the off-diagonal blocks of so many lanes.
template <int distance, int... i>
MLX_FUSED_INLINE void exchange(Register<uint32_t> (&registers)[lanes],
                               std::integer_sequence<int, i...>) {
  constexpr int count = lanes;
  for (size_t k = 0; k < lanes; ++k) {
    if ((k & distance) == 0) {
      const auto a = registers[k];
      const auto b = registers[k + distance];
      registers[k] = __builtin_shufflevector(
          a, b, (i & distance ? count + i - distance : i)...);
      registers[k + distance] = __builtin_shufflevector(
          a, b, (i & distance ? count + i : i + distance)...);
    }
  }
  if constexpr (distance > 1) {
    exchange<distance / 2>(registers, std::integer_sequence<int, i...>());
  }
}

MLX_FUSED_INLINE void turn_registers(Register<uint32_t> (&registers)[lanes]) {
  exchange<lanes / 2>(registers, std::make_integer_sequence<int, lanes>());
}

MLX_FUSED_INLINE void turn_square(const uint32_t* in, int64_t column_stride,
                                  uint32_t* out, size_t row_stride) {
  Register<uint32_t> registers[lanes];
  for (size_t k = 0; k < lanes; ++k) {
    memcpy(&registers[k], in + static_cast<int64_t>(k) * column_stride,
           sizeof(registers[k]));
  }
  turn_registers(registers);
  for (size_t k = 0; k < lanes; ++k) {
    memcpy(out + k * row_stride, &registers[k], sizeof(registers[k]));
  }
}

// Pairs of the first or the second four of each eight elements.
template <int half, int... i>
MLX_FUSED_INLINE Register<uint16_t> paired(Register<uint16_t> a,
                                           Register<uint16_t> b,
                                           std::integer_sequence<int, i...>) {
  constexpr int count = 2 * lanes;
  return __builtin_shufflevector(
      a, b, (i / 8 * 8 + 4 * half + i % 8 / 2 + i % 2 * count)...);
}

template <int half>
MLX_FUSED_INLINE void turn_half(const uint16_t* in, int64_t column_stride,
                                uint16_t* out, size_t row_stride) {
  Register<uint32_t> registers[lanes];
  for (size_t k = 0; k < lanes; ++k) {
    Register<uint16_t> columns[2];
    for (size_t i = 0; i < 2; ++i) {
      memcpy(&columns[i], in + static_cast<int64_t>(2 * k + i) * column_stride,
             sizeof(columns[i]));
    }
    registers[k] = reinterpret_cast<Register<uint32_t>>(paired<half>(
        columns[0], columns[1], std::make_integer_sequence<int, 2 * lanes>()));
  }
  turn_registers(registers);
  for (size_t k = 0; k < lanes; ++k) {
    memcpy(out + (k / 4 * 8 + 4 * half + k % 4) * row_stride, &registers[k],
           sizeof(registers[k]));
  }
}

MLX_FUSED_INLINE void turn_square(const uint16_t* in, int64_t column_stride,
                                  uint16_t* out, size_t row_stride) {
  turn_half<0>(in, column_stride, out, row_stride);
  turn_half<1>(in, column_stride, out, row_stride);
}

template <typename T>
void turn_squares(const T* in, const T* next, int64_t column_stride,
                  size_t rows, size_t columns, T* out) {
  // As many columns as a line of the cache has elements, at a time.
  constexpr size_t width = 64 / sizeof(T), side = square<T>;
  // Few enough for what is fetched to be there still when its turn comes.
  constexpr size_t ahead = 64;
  const size_t square_rows = rows / side * side;
  const size_t square_columns = columns / side * side;
  const auto place = [column_stride](size_t row, size_t column) {
    return row + static_cast<int64_t>(column) * column_stride;
  };
  for (size_t column = 0; column < square_columns; column += width) {
    const size_t left = square_columns - column;
    const size_t count = left < width ? left : width;
    const T* fetched = column + ahead < square_columns
                           ? in + place(0, column + ahead)
                       : next ? next + place(0, column + ahead - square_columns)
                              : nullptr;
    for (size_t i = 0; i < count && fetched; ++i) {
      for (size_t row = 0; row < rows; row += width) {
        __builtin_prefetch(fetched + place(row, i));
      }
    }
    for (size_t row = 0; row < square_rows; row += side) {
      for (size_t i = 0; i < count; i += side) {
        turn_square(in + place(row, column + i), column_stride,
                    out + row * columns + column + i, columns);
      }
    }
  }
  for (size_t row = 0; row < rows; ++row) {
    for (size_t column = row < square_rows ? square_columns : 0;
         column < columns; ++column) {
      out[row * columns + column] = in[place(row, column)];
    }
  }
}

template <typename T>
void turn_typed(const char* in, const char* next, int64_t column_stride,
                size_t rows, size_t columns, char* out) {
  turn_squares(reinterpret_cast<const T*>(in), reinterpret_cast<const T*>(next),
               column_stride, rows, columns, reinterpret_cast<T*>(out));
}

void turn(size_t itemsize, const char* in, const char* next,
          int64_t column_stride, size_t rows, size_t columns, char* out) {
  (itemsize == 4
       ? turn_typed<uint32_t>
       : turn_typed<uint16_t>)(in, next, column_stride, rows, columns, out);
}

}  // namespace

}  // namespace mlx_fused::cpu
