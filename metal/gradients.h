// How a gradient is read: row-contiguous, with any strides, or transposed.

// Where the element with this row-major index is, in elements. Index is 32 bits
// wide where the array allows it: division of 64 bits is slow on a GPU.
template <typename Index>
METAL_FUNC Index
locate(Index index, constant int64_t* walk, uint32_t dimensions) {
  Index location = 0;
  for (int d = int(dimensions) - 1; d >= 0; --d) {
    const Index size = Index(walk[d]);
    location += (index % size) * Index(walk[int(dimensions) + d]);
    index /= size;
  }
  return location;
}

// Neighbouring elements of an array of any strides. Divides for the first, and
// again only where a row ends.
template <typename Index, typename T>
METAL_FUNC void load_strided(
    const device T* in,
    constant int64_t* walk,
    uint32_t dimensions,
    const thread Elements& at,
    thread float* out) {
  const Index row = Index(walk[int(dimensions) - 1]);
  const Index stride = Index(walk[2 * int(dimensions) - 1]);
  Index index = Index(at.start);
  Index location = locate<Index>(index, walk, dimensions);
  Index left = row - index % row;
  FOR_EACH_OF_VECTOR {
    out[i] = 0;
    if (i < at.count) {
      out[i] = static_cast<float>(in[location]);
      ++index;
      location += stride;
      --left;
      if (left == 0 && i + 1 < at.count) {
        location = locate<Index>(index, walk, dimensions);
        left = row;
      }
    }
  }
}

template <typename T>
METAL_FUNC void load_gradient(
    const device T* in,
    constant LaunchTensor& tensor,
    constant int64_t* walks,
    const thread Elements& at,
    thread float* out) {
  if (tensor.dimensions == 0) {
    load_vector(in, at, out);
  } else if (tensor.is_narrow != 0) {
    load_strided<int>(in, walks + tensor.walk, tensor.dimensions, at, out);
  } else {
    load_strided<int64_t>(in, walks + tensor.walk, tensor.dimensions, at, out);
  }
}

// A transposed gradient is read along its columns, which are contiguous, in
// blocks of rows x columns elements, and handed over in threadgroup memory:
// each line of the cache is read once. One column more keeps the threads of a
// simdgroup on different banks.
template <int rows, int columns>
struct BlockShape {
  static constexpr constant int pitch = columns + 1;
  static constexpr constant int staged = rows * pitch;  // elements
  static constexpr constant int vectors =               // of each thread
      rows * columns / (tile_threads * vector_size);
};

// Where a block lies. walk holds, of Transposed in csrc/strides.h, rows,
// columns, row_stride, column_stride; then the sizes, strides and row-major
// strides of the dimensions of the matrices.
struct Block {
  int64_t in_gradient;
  int64_t in_row_major;
  int64_t row_stride;
  int64_t column_stride;
  int rows;  // of the block
  int columns;
};

template <int rows, int columns>
METAL_FUNC Block
block_of_tile(uint tile, constant int64_t* walk, uint32_t dimensions) {
  const uint across = uint((walk[1] + columns - 1) / columns);
  const uint down = uint((walk[0] + rows - 1) / rows);
  const int64_t row = int64_t(tile / across % down) * rows;
  const int64_t column = int64_t(tile % across) * columns;
  Block result;
  result.row_stride = walk[2];
  result.column_stride = walk[3];
  result.in_gradient = row + column * walk[3];
  result.in_row_major = row * walk[2] + column;
  result.rows = int(walk[0] - row < rows ? walk[0] - row : rows);
  result.columns = int(walk[1] - column < columns ? walk[1] - column : columns);
  uint matrix = tile / across / down;
  constant int64_t* sizes = walk + 4;
  for (int d = int(dimensions) - 1; d >= 0; --d) {
    const int64_t position = matrix % uint(sizes[d]);
    matrix /= uint(sizes[d]);
    result.in_gradient += position * sizes[int(dimensions) + d];
    result.in_row_major += position * sizes[2 * int(dimensions) + d];
  }
  return result;
}

template <int rows, int columns, typename T>
METAL_FUNC void stage_block(
    const device T* gradient,
    const thread Block& at,
    bool may_vectorize,
    uint thread_index,
    threadgroup T* stage) {
  constexpr int pitch = BlockShape<rows, columns>::pitch;
  for (int vector = 0; vector < BlockShape<rows, columns>::vectors; ++vector) {
    const int index = vector * tile_threads + int(thread_index);
    const int column = index / (rows / vector_size);
    const int row = index % (rows / vector_size) * vector_size;
    if (column >= at.columns || row >= at.rows) {
      continue;
    }
    const int64_t start =
        at.in_gradient + row + int64_t(column) * at.column_stride;
    if (may_vectorize && row + vector_size <= at.rows) {
      const vec<T, 4> values =
          *reinterpret_cast<const device vec<T, 4>*>(gradient + start);
      FOR_EACH_OF_VECTOR { stage[(row + i) * pitch + column] = values[i]; }
    } else {
      FOR_EACH_OF_VECTOR {
        if (row + i < at.rows) {
          stage[(row + i) * pitch + column] = gradient[start + i];
        }
      }
    }
  }
}

// A thread's elements of a block, and their gradients. Where rows cannot be
// read as vectors, neighbouring threads take neighbouring elements.
template <int rows, int columns, typename T>
METAL_FUNC Elements load_staged(
    const threadgroup T* stage,
    const thread Block& at,
    bool may_vectorize,
    int vector,
    uint thread_index,
    thread float* out) {
  const int first = vector * tile_threads * vector_size;
  const int index =
      first + int(thread_index) * (may_vectorize ? vector_size : 1);
  const int row = index / columns;
  const int column = index % columns;
  const int rows_apart = may_vectorize ? 0 : tile_threads / columns;
  const int columns_apart = may_vectorize ? 1 : 0;
  int count = 0;
  FOR_EACH_OF_VECTOR {
    const int r = row + i * rows_apart;
    const int c = column + i * columns_apart;
    out[i] = 0;
    if (r < at.rows && c < at.columns) {
      out[i] =
          static_cast<float>(stage[r * BlockShape<rows, columns>::pitch + c]);
      count = i + 1;
    }
  }
  return {
      at.in_row_major + row * at.row_stride + column,
      may_vectorize ? 1 : rows_apart * at.row_stride,
      count,
      may_vectorize && count == vector_size};
}
