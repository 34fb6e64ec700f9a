// Programs of elementwise operations on the arrays of many items, such as an optimizer's update of all parameters, and
// sums of squares of many arrays.

#ifndef DENSENET_JAX_KERNELS_CPU_NATIVE_ELEMENTWISE_H_
#define DENSENET_JAX_KERNELS_CPU_NATIVE_ELEMENTWISE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "threads.h"

namespace densenet_jax {

constexpr int64_t kBlock = 512;     // values of a register, in the first cache with a dozen others
constexpr int64_t kPiece = 1 << 15;  // values that one thread takes at once

// Operations in the order of _OPERATIONS in ../elementwise.py, each of registers a, b and c.
enum Operation : int64_t { kAdd, kSub, kMul, kDiv, kMax, kMin, kSqrt, kNeg, kAbs, kSelect, kOperations };

// Four numbers an operation: itself and its registers. Registers are an item's inputs, then the scalars, then the
// results of the operations in their order.
struct Program {
  const int64_t* code;
  int64_t operations, inputs, scalars;
  const int64_t* results;  // registers
  int64_t outputs;
};

template <typename T>
struct Item {
  std::vector<const T*> inputs;
  std::vector<T*> outputs;
  int64_t size;
};

struct Piece {
  int64_t item, begin, end;
};

// Cuts items of these sizes into pieces; an item without values has one as well.
inline std::vector<Piece> CutIntoPieces(const std::vector<int64_t>& sizes) {
  std::vector<Piece> pieces;
  for (size_t item = 0; item < sizes.size(); ++item)
    for (int64_t begin = 0; begin == 0 || begin < sizes[item]; begin += kPiece)
      pieces.push_back({static_cast<int64_t>(item), begin, std::min(sizes[item], begin + kPiece)});
  return pieces;
}

// Whether each operation is known and reads only what lies before it.
inline bool IsValid(const Program& p) {
  for (int64_t i = 0; i < p.operations; ++i) {
    const int64_t* code = p.code + 4 * i;
    if (code[0] < 0 || code[0] >= kOperations) return false;
    for (int argument = 1; argument < 4; ++argument)
      if (code[argument] < 0 || code[argument] >= p.inputs + p.scalars + i) return false;
  }
  for (int64_t i = 0; i < p.outputs; ++i)
    if (p.results[i] < 0 || p.results[i] >= p.inputs + p.scalars + p.operations) return false;
  return true;
}

template <typename T, typename F>
void ForEach(T* __restrict y, const T* a, const T* b, int64_t count, F f) {
  for (int64_t i = 0; i < count; ++i) y[i] = f(a[i], b[i]);
}

template <typename T>
void Operate(const int64_t* code, const T* const* registers, T* y, int64_t count) {
  const T *a = registers[code[1]], *b = registers[code[2]], *c = registers[code[3]];
  switch (code[0]) {
    case kAdd: return ForEach(y, a, b, count, [](T a, T b) { return a + b; });
    case kSub: return ForEach(y, a, b, count, [](T a, T b) { return a - b; });
    case kMul: return ForEach(y, a, b, count, [](T a, T b) { return a * b; });
    case kDiv: return ForEach(y, a, b, count, [](T a, T b) { return a / b; });
    case kMax: return ForEach(y, a, b, count, [](T a, T b) { return a > b || a != a ? a : b; });
    case kMin: return ForEach(y, a, b, count, [](T a, T b) { return a < b || a != a ? a : b; });
    case kSqrt: return ForEach(y, a, a, count, [](T a, T) { return std::sqrt(a); });
    case kNeg: return ForEach(y, a, a, count, [](T a, T) { return -a; });
    case kAbs: return ForEach(y, a, a, count, [](T a, T) { return std::abs(a); });
    default:
      for (int64_t i = 0; i < count; ++i) y[i] = a[i] != 0 ? c[i] : b[i];
  }
}

// Runs the program for each item; an output may lie in the memory of an input of its item.
template <typename T>
void RunProgram(ffi::ThreadPool& pool, const Program& program, const T* scalars, const std::vector<Item<T>>& items) {
  std::vector<int64_t> sizes;
  for (const Item<T>& item : items) sizes.push_back(item.size);
  const std::vector<Piece> pieces = CutIntoPieces(sizes);
  ParallelFor(pool, pieces.size(), [&](int64_t number) {
    const auto [index, begin, end] = pieces[number];
    const Item<T>& item = items[index];
    const int64_t first = program.inputs + program.scalars;
    T* memory = ThreadScratch<T>(0, (program.scalars + program.operations) * kBlock);
    std::vector<const T*> registers(first + program.operations);
    for (int64_t i = program.inputs; i < static_cast<int64_t>(registers.size()); ++i)
      registers[i] = memory + (i - program.inputs) * kBlock;
    for (int64_t i = 0; i < program.scalars; ++i) std::fill_n(memory + i * kBlock, kBlock, scalars[i]);
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t count = std::min(kBlock, end - at);
      for (int64_t i = 0; i < program.inputs; ++i) registers[i] = item.inputs[i] + at;
      for (int64_t i = 0; i < program.operations; ++i)
        Operate(program.code + 4 * i, registers.data(), memory + (program.scalars + i) * kBlock, count);
      for (int64_t i = 0; i < program.outputs; ++i)
        std::copy_n(registers[program.results[i]], count, item.outputs[i] + at);
    }
  });
}

// Computes the sum of each item's squares.
template <typename T>
void SquareSums(ffi::ThreadPool& pool, const std::vector<const T*>& items, const std::vector<int64_t>& sizes, T* sums) {
  constexpr int kLanes = 32;
  const std::vector<Piece> pieces = CutIntoPieces(sizes);
  std::vector<T> partial(pieces.size());
  ParallelFor(pool, pieces.size(), [&](int64_t number) {
    const auto [item, begin, end] = pieces[number];
    T lanes[kLanes] = {};
    int64_t at = begin;
    for (; at + kLanes <= end; at += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += items[item][at + lane] * items[item][at + lane];
    for (; at < end; ++at) lanes[0] += items[item][at] * items[item][at];
    for (T lane : lanes) partial[number] += lane;
  });
  std::fill_n(sums, sizes.size(), T{0});
  for (size_t number = 0; number < pieces.size(); ++number) sums[pieces[number].item] += partial[number];
}

}  // namespace densenet_jax

#endif  // DENSENET_JAX_KERNELS_CPU_NATIVE_ELEMENTWISE_H_
