#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <mutex>

namespace stbp::cpu {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Sizes in steps of an eighth at most, so that results of about the same size share their blocks; whole huge pages
// where that wastes no more.
size_t block_size(size_t bytes) {
  size_t unit = 4096;
  while (unit * 16 <= bytes && unit < kHugePage) unit *= 2;
  return round_up(bytes, unit);
}

void* map(size_t size) {
  // Huge pages make 512 times fewer page faults, but only where the block begins at one.
  const bool huge = size >= kHugePage;
  const size_t asked = huge ? size + kHugePage : size;
  void* const mapped = mmap(nullptr, asked, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  if (!huge) return mapped;
  char* const begin = static_cast<char*>(mapped);
  char* const block = reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(begin), kHugePage));
  if (block > begin) munmap(begin, block - begin);
  if (begin + asked > block + size) munmap(block + size, begin + asked - (block + size));
  // Has an effect where /sys/kernel/mm/transparent_hugepage/enabled says madvise; a refusal costs only speed.
  madvise(block, size, MADV_HUGEPAGE);
  return block;
}

class Cache {
 public:
  void* take(size_t size) {
    if (limit_ == 0) return nullptr;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ++requests_;
      // The one freed last: most of it may still be in the processor's caches.
      for (auto block = free_.rbegin(); block != free_.rend(); ++block) {
        if (block->size != size) continue;
        void* const found = block->memory;
        bytes_ -= size;
        free_.erase(std::next(block).base());
        return found;
      }
    }
    void* const fresh = map(size);
    if (fresh) return fresh;
    empty();
    return map(size);
  }

  void give(void* memory, size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back({memory, size, requests_});
    bytes_ += size;
    while (!free_.empty() && (bytes_ > limit_ || requests_ - free_.front().freed_at > kPatience)) drop_oldest();
  }

  int64_t empty() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t bytes = int64_t(bytes_);
    while (!free_.empty()) drop_oldest();
    return bytes;
  }

  int64_t limit() const { return int64_t(limit_); }

 private:
  struct Block {
    void* memory;
    size_t size;
    uint64_t freed_at;
  };

  // A block that so many requests could not use is not of the sizes in use now.
  static constexpr uint64_t kPatience = 1000;

  static size_t configured_limit() {
    if (const char* const megabytes = std::getenv("STBP_CUDA_CPU_CACHE_MB"))
      return size_t(std::max(0ll, std::atoll(megabytes))) << 20;
    return size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGE_SIZE)) / 8;
  }

  void drop_oldest() {
    munmap(free_.front().memory, free_.front().size);
    bytes_ -= free_.front().size;
    free_.pop_front();
  }

  std::mutex mutex_;
  std::deque<Block> free_;  // the longest free first
  size_t bytes_ = 0;        // of all of them
  uint64_t requests_ = 0;
  const size_t limit_ = configured_limit();
};

// Never destroyed: a tensor may outlive everything else in the process.
Cache& cache() {
  static Cache* const the_cache = new Cache;
  return *the_cache;
}

}  // namespace

void* take_block(size_t bytes) { return cache().take(block_size(bytes)); }
void give_block(void* block, size_t bytes) { cache().give(block, block_size(bytes)); }
int64_t cache_limit() { return cache().limit(); }
int64_t empty_cache() { return cache().empty(); }

}  // namespace stbp::cpu
