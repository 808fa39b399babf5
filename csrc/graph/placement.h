// Memory in place: where a group's outputs are computed.
#pragma once

#include <functional>

#include "graph/layout.h"

namespace mlx_fused {

// Bytes from which waiting is cheaper than a copy.
constexpr size_t worth_waiting = 1 << 16;

// Gives each output memory: its input's own where nothing else holds that,
// otherwise new memory, row-contiguous, which the caller fills from the input.
//
// MLX donates an input's memory when the input has no other owner. In a
// primitive with several outputs that is never so, because each output holds
// the list of inputs. So all outputs but the one that is being evaluated are
// made to let go of their lists. For AdamW of one tensor:
//
//   before   p.inputs = m.inputs = v.inputs = {p, m, v, g}: 3 owners each
//   after    p.inputs = {p, m, v, g}: 1 owner, so the memory can be taken
//
// If anything throws before the work is under way (MLX's streams rethrow
// earlier errors, allocators run out), the destructor puts the lists back, and
// the graph can be evaluated again. After commit() it must not: the inputs have
// been overwritten.
class Placement {
 public:
  // Earlier work that is still under way holds what it reads. wait(), if given,
  // returns when that work is done, and is called when many bytes depend on it.
  // `restore` gives the list of inputs of an output that had let go of it.
  Placement(const Arrays& inputs, Arrays& outputs, const GroupLayout& layout,
            std::function<Arrays()> restore,
            const std::function<void()>& wait = nullptr);
  ~Placement();
  Placement(const Placement&) = delete;
  Placement& operator=(const Placement&) = delete;

  // Whether an output has its input's memory.
  bool in_place(int output) const { return in_place_ >> output & 1; }

  // Whether it has no input that it replaces.
  bool is_new(int output) const { return is_new_ >> output & 1; }

  // The work on the outputs is under way: they keep their memory.
  void commit();

 private:
  void undo();

  Arrays& outputs_;
  std::function<Arrays()> restore_;
  uint64_t released_ = 0;  // a bit for each output, as in_place_
  uint64_t in_place_ = 0;
  uint64_t is_new_ = 0;
  bool is_committed_ = false;
};

// Whether an earlier evaluation put the work under way before MLX threw. It
// must not be done twice.
inline bool is_placed(const Arrays& outputs) {
  return outputs[0].data_shared_ptr() != nullptr;
}

// Memory for an array; throws std::runtime_error if there is none.
void allocate(mx::array& a);

// Bytes that could not be updated in place, since the process began.
size_t bytes_copied();

}  // namespace mlx_fused
