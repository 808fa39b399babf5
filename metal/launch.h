// What a launch tells its kernel about the tensors it serves, and how threads
// divide them. MSL and C++ both compile this file.

// A tile is what one threadgroup does: so many threads, each with so many
// elements, of which it takes four neighbours at a time.
static constexpr constant int tile_threads = 256;
static constexpr constant int vector_size = 4;
static constexpr constant int vectors_each = 4;
static constexpr constant int tile_size =
    tile_threads * vector_size * vectors_each;

// One more than there are tensors: the last one has only first_tile, the number
// of all tiles.
struct LaunchTensor {
  int64_t size;         // elements
  int64_t first;        // of a piece of a tensor its first, for random bits
  uint32_t first_tile;  // the number, in the launch, of its first tile
  uint32_t vectorized;  // 1 if all its arrays are aligned to four elements
  uint32_t dimensions;  // of its gradient's walk; 0 if row-contiguous
  uint32_t walk;        // where that walk stands: the sizes, then the strides
  uint32_t is_narrow;   // 1 if 32 bits suffice for the walk
  uint32_t is_transposed;  // 1 if its tiles are blocks, see gradients.h
  uint32_t numbers;        // where its rule's numbers stand
  uint32_t scalars[5];     // its entry of each scalar (csrc/graph/layout.h)
  uint32_t number;         // its own in the step, for random bits
  uint32_t first_partial;  // where the sums of its tiles go (sums.metal)
};

// The first of a thread's four neighbours, as an index into the tensor. A
// tensor may hold more than 2^32 elements.
inline int64_t vector_start(
    uint32_t tile,
    uint32_t first_tile,
    uint32_t thread_index,
    int vector) {
  return int64_t(tile - first_tile) * tile_size +
         int64_t(vector) * (tile_threads * vector_size) +
         int64_t(thread_index) * vector_size;
}
