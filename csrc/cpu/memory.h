// Memory for large results, kept when it is freed, because getting it anew costs more than computing what goes in: the
// operating system hands out zeroed pages one by one as they are touched, and malloc gives large blocks back at once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace stbp::cpu {

// Blocks from here on are kept; of smaller ones malloc takes good care itself.
constexpr size_t kSmallestKept = size_t(256) << 10;

// At least `bytes`, aligned to 64; null if there is no memory, or nothing is to be kept. From any thread, as the
// others.
void* take_block(size_t bytes);

// The block is free again; `bytes` as it was taken.
void give_block(void* block, size_t bytes);

// The most that free blocks may hold, in bytes: STBP_CUDA_CPU_CACHE_MB, else an eighth of the machine's memory.
int64_t cache_limit();

// Gives all free blocks back to the operating system; returns their bytes.
int64_t empty_cache();

}  // namespace stbp::cpu
