// Memory for large outputs. Malloc returns such blocks to the system when they are freed, and the next call's first
// touch of every page then costs more than the kernel: at 64 MiB a tensor, half of the whole step. So the blocks are
// kept.
//
// What is kept is bounded, and `vaeops.empty_cache()` gives it back. (MADV_FREE, by which the system could take it,
// costs 7 to 20 % of the step.) Nothing here waits for a lock: a caller that finds the list busy (or inherited from a
// fork that happened while it was) goes to the system directly.
#include <cstdint>
#include <mutex>
#include <vector>

#include "vaeops.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vaeops::cpu {

#if defined(__linux__)
namespace {

constexpr size_t kPage = size_t{2} << 20;  // a huge page: what blocks of that size and more consist of
constexpr size_t kSmallUnit = size_t{64} << 10;
constexpr size_t kMostIdle = size_t{512} << 20;
constexpr size_t kMostBlocks = 64;

struct Block {
  void* data;
  size_t bytes;
};

struct Idle {
  std::mutex mutex;
  std::vector<Block> blocks;  // oldest first
  size_t bytes = 0;
};

Idle& idle() {
  static Idle& list = *new Idle;  // never destroyed: tensors may outlive static objects
  return list;
}

size_t whole_pages(size_t bytes) {
  const size_t unit = bytes >= kPage ? kPage : kSmallUnit;
  return (bytes + unit - 1) / unit * unit;
}

void* map(size_t bytes) {
  if (bytes < kPage) {
    void* const data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return data == MAP_FAILED ? nullptr : data;
  }
  // A page more than asked for, so that an aligned part can be cut out.
  void* const whole = mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (whole == MAP_FAILED) return nullptr;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(whole), aligned = (begin + kPage - 1) / kPage * kPage;
  if (aligned > begin) munmap(whole, aligned - begin);
  if (aligned < begin + kPage) munmap(reinterpret_cast<void*>(aligned + bytes), begin + kPage - aligned);
  madvise(reinterpret_cast<void*>(aligned), bytes, MADV_HUGEPAGE);  // a hint: a refusal is of no consequence
  return reinterpret_cast<void*>(aligned);
}

}  // namespace

void* take_pages(size_t bytes) {
  bytes = whole_pages(bytes);
  Idle& list = idle();
  if (const std::unique_lock<std::mutex> lock(list.mutex, std::try_to_lock); lock.owns_lock()) {
    for (size_t i = list.blocks.size(); i-- > 0;) {  // the one used last is the likeliest to be in a cache
      if (list.blocks[i].bytes != bytes) continue;
      void* const data = list.blocks[i].data;
      list.blocks.erase(list.blocks.begin() + static_cast<std::ptrdiff_t>(i));
      list.bytes -= bytes;
      return data;
    }
  }
  return map(bytes);
}

void give_pages(void* data, size_t bytes) {
  bytes = whole_pages(bytes);
  Idle& list = idle();
  const std::unique_lock<std::mutex> lock(list.mutex, std::try_to_lock);
  if (!lock.owns_lock() || bytes > kMostIdle) {
    munmap(data, bytes);
    return;
  }
  while (list.bytes + bytes > kMostIdle || list.blocks.size() >= kMostBlocks) {
    munmap(list.blocks.front().data, list.blocks.front().bytes);
    list.bytes -= list.blocks.front().bytes;
    list.blocks.erase(list.blocks.begin());
  }
  list.blocks.push_back({data, bytes});
  list.bytes += bytes;
}

size_t release_pages() {
  Idle& list = idle();
  const std::unique_lock<std::mutex> lock(list.mutex, std::try_to_lock);
  if (!lock.owns_lock()) return 0;
  const size_t released = list.bytes;
  for (const Block& block : list.blocks) munmap(block.data, block.bytes);
  list.blocks.clear();
  list.bytes = 0;
  return released;
}

#else

void* take_pages(size_t) { return nullptr; }
void give_pages(void*, size_t) {}
size_t release_pages() { return 0; }

#endif

}  // namespace vaeops::cpu

extern "C" __attribute__((visibility("default"))) size_t vaeops_release_pages() { return vaeops::cpu::release_pages(); }
