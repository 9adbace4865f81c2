// What csrc/cuda/*.cuh takes from nvcc, for compiling it as plain C++.
#pragma once

#include <atomic>
#include <cstddef>
#include <deque>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other

// Aligned as CUDA's own: under UBSan a pack at a misaligned address is an error, as it is on a GPU.
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct Index {
  unsigned x;
};
inline thread_local Index blockIdx, threadIdx;

// The threads of a block meet here; run.h lets the others come.
inline void __syncthreads();
template <class T>
T __shfl_xor_sync(unsigned threads, T value, int apart);

// An array, and how much of it has been loaded.
struct Counted {
  Counted(const void* begin_, const void* end_) : begin(begin_), end(end_) {}

  const void *begin, *end;
  std::atomic<size_t> bytes{0};
};
inline std::deque<Counted> counted;

// Hints to the caches mean nothing here.
template <class T>
T __ldg(const T* from) {
  for (Counted& array : counted)
    if (from >= array.begin && from < array.end) array.bytes.fetch_add(sizeof(T), std::memory_order_relaxed);
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return __ldg(from);
}
template <class T>
void __stwb(T* to, T value) {
  *to = value;
}
template <class T>
void __stcs(T* to, T value) {
  __stwb(to, value);
}
