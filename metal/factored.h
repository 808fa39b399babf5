// What a launch of Adafactor's passes (factored.metal) is told of its tensors.
// MSL and C++ both compile this file.

static constexpr constant int factored_threads = 256;
static constexpr constant int simdgroup_columns = 128;  // four to each lane
// Rows of a transposed gradient that are turned at a time.
static constexpr constant int turned_rows = 32;
// Elements in threadgroup memory. Each row is followed by one that is unused,
// so that a column's are in different banks.
static constexpr constant int stage_size =
    turned_rows * (simdgroup_columns + 1) + 96;

// A tensor as matrices in the order of their memory, cut into tiles of which a
// threadgroup takes one. Its simdgroups read 128 neighbouring columns of a row
// each: rows_at_once of them stand below one another, the others beside.
//
// The first two passes walk a transposed gradient by its own rows, which are
// the matrix' columns; the last one walks all arrays as the parameter lies.
//
// One more than there are tensors: the last one has only first_tile and
// first_group, the numbers of all tiles and groups.
struct FactoredTensor {
  int64_t size;           // elements
  int64_t rows;           // of a matrix, as it is walked
  int64_t columns;        // the same
  int64_t row_stride;     // of the gradient
  int64_t column_stride;  // the same
  uint32_t dimensions;    // of the matrices' places in the gradient
  uint32_t walk;          // where those stand: the sizes, then the strides
  uint32_t first_tile;    // the number, in the launch, of its first tile
  uint32_t tile_rows;
  uint32_t tile_columns;
  uint32_t tiles_down;    // of a matrix
  uint32_t tiles_across;  // the same
  uint32_t rows_at_once;
  uint32_t is_swapped;  // 1 if rows are walked as columns
  uint32_t is_vector;   // 1 if the only row has no mean
  uint32_t is_staged;   // 1 if the gradient is turned in threadgroup memory
  uint32_t is_whole;    // 1 if all of it is in threadgroup memory
  uint32_t vectorized;  // 1 if gradients can be read by fours
  uint32_t parameter_vectorized;  // 1 if the other arrays can
  uint32_t parameter_share;  // elements whose squares a tile of pass one adds
  uint32_t sums;             // tiles of pass one, each with a sum of squares
  // In the second launch a threadgroup finishes this many of a matrix' row or
  // column means: the row groups of a matrix come first.
  uint32_t first_group;
  uint32_t row_groups;
  uint32_t column_groups;
  // Where its parts of the buffers between the passes begin.
  uint32_t across_sums;     // of squares: a matrix' rows, each by 128 columns
  uint32_t down_sums;       // of squares: a matrix' tiles, each by its columns
  uint32_t parameter_sums;  // of squares: tiles
  uint32_t down_factors;    // a matrix' rows
  uint32_t across_factors;  // a matrix' columns
  uint32_t row_sums;        // of row means: a matrix' row groups
  uint32_t update_sums;     // of squares: tiles
  uint32_t numbers;         // where its rule's numbers stand
  uint32_t scalars[4];      // its entry of each scalar (csrc/graph/layout.h)
};
