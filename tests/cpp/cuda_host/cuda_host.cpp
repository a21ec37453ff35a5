#include "cuda_host.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define VAEOPS_ASAN 1
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define VAEOPS_ASAN 1
#endif
#ifdef VAEOPS_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_host {

Options options;
dim3 thread_index, block_index, block_size, grid_size;

namespace {

constexpr unsigned kWarp = 32, kMostThreads = 1024;
constexpr size_t kStack = 256 << 10;

cudaError_t last_error = cudaSuccess;

enum class State { ready, at_barrier, at_exchange, done };

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  State state = State::done;
  dim3 index;
  unsigned mask = 0;     // of the exchange it waits in
  uint64_t value = 0;    // that it leaves there
  uint64_t seen[kWarp];  // that it found there
};

struct Machine {
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  std::vector<Fiber> fibers = std::vector<Fiber>(kMostThreads);
  unsigned count = 0, current = 0;
  const std::function<void()>* body = nullptr;
  std::vector<char> shared;
  uint64_t random = 0;
};

Machine& machine() {
  static Machine instance;
  return instance;
}

[[noreturn]] void die(const char* what) {
  std::fprintf(stderr, "cuda_host: block %u, thread %u: %s\n", block_index.x, thread_index.x, what);
  std::_Exit(3);
}

uint64_t next_random(Machine& m) {  // splitmix64
  uint64_t x = m.random += 0x9E3779B97F4A7C15ull;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ x >> 27) * 0x94D049BB133111EBull;
  return x ^ x >> 31;
}

std::vector<unsigned> order(Machine& m, unsigned n) {
  std::vector<unsigned> places(n);
  for (unsigned i = 0; i < n; ++i) places[i] = i;
  if (options.seed != 0) {
    for (unsigned i = n; i > 1; --i) std::swap(places[i - 1], places[next_random(m) % i]);
  }
  return places;
}

void leave(Machine& m, Fiber& fiber, bool for_good) {
#ifdef VAEOPS_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, m.scheduler_stack, m.scheduler_stack_size);
#else
  (void)for_good;
#endif
  swapcontext(&fiber.context, &m.scheduler);
#ifdef VAEOPS_ASAN
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

void wait(State state) {
  Machine& m = machine();
  Fiber& fiber = m.fibers[m.current];
  fiber.state = state;
  leave(m, fiber, false);
}

void fiber_main() {
  Machine& m = machine();
#ifdef VAEOPS_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_stack_size);
#endif
  (*m.body)();
  Fiber& fiber = m.fibers[m.current];
  fiber.state = State::done;
  leave(m, fiber, true);
}

void start(Fiber& fiber, dim3 index) {
  if (fiber.stack == nullptr) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) die("no memory for a stack");
    fiber.stack = static_cast<char*>(memory);
  }
#ifdef VAEOPS_ASAN
  __asan_unpoison_memory_region(fiber.stack, kStack);  // frames that the last block left
#endif
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  fiber.state = State::ready;
  fiber.index = index;
}

void resume(Machine& m, unsigned t) {
  Fiber& fiber = m.fibers[t];
  m.current = t;
  thread_index = fiber.index;
#ifdef VAEOPS_ASAN
  __sanitizer_start_switch_fiber(&m.scheduler_fake_stack, fiber.stack, kStack);
#endif
  swapcontext(&m.scheduler, &fiber.context);
#ifdef VAEOPS_ASAN
  __sanitizer_finish_switch_fiber(m.scheduler_fake_stack, nullptr, nullptr);
#endif
}

// Lets go the lanes of an exchange that has all the lanes of its mask. True if there was one.
bool release_exchanges(Machine& m) {
  bool released = false;
  for (unsigned first = 0; first < m.count; first += kWarp) {
    for (unsigned t = first; t < first + kWarp && t < m.count; ++t) {
      if (m.fibers[t].state != State::at_exchange) continue;
      const unsigned mask = m.fibers[t].mask;
      bool complete = true;
      for (unsigned l = 0; l < kWarp && complete; ++l) {
        if ((mask >> l & 1u) == 0) continue;
        complete =
            first + l < m.count && m.fibers[first + l].state == State::at_exchange && m.fibers[first + l].mask == mask;
      }
      if (!complete) continue;
      released = true;
      uint64_t values[kWarp] = {};
      for (unsigned l = 0; l < kWarp; ++l) {
        if ((mask >> l & 1u) != 0) values[l] = m.fibers[first + l].value;
      }
      for (unsigned l = 0; l < kWarp; ++l) {
        if ((mask >> l & 1u) == 0) continue;
        m.fibers[first + l].state = State::ready;
        memcpy(m.fibers[first + l].seen, values, sizeof(values));
      }
    }
  }
  return released;
}

// Lets go the block's barrier when all threads that have not ended wait there.
bool release_barrier(Machine& m) {
  for (unsigned t = 0; t < m.count; ++t) {
    if (m.fibers[t].state != State::at_barrier && m.fibers[t].state != State::done) return false;
  }
  for (unsigned t = 0; t < m.count; ++t) {
    if (m.fibers[t].state == State::at_barrier) m.fibers[t].state = State::ready;
  }
  return true;
}

void run_block(Machine& m, dim3 block) {
  for (unsigned t = 0; t < m.count; ++t) {
    start(m.fibers[t], {t % block.x, t / block.x % block.y, t / (block.x * block.y)});
  }
  // With a seed some warps hang back: they sit out half or nearly all turns.
  std::vector<unsigned> sits_out(m.count / kWarp + 1, 0);
  for (unsigned& sixteenths : sits_out) sixteenths = options.seed == 0 ? 0 : next_random(m) % 3 * 15 / 2;
  for (;;) {
    bool moved = false, alive = false;
    std::vector<bool> rests(sits_out.size());
    for (size_t w = 0; w < rests.size(); ++w) rests[w] = sits_out[w] > 0 && next_random(m) % 16 < sits_out[w];
    for (unsigned t : order(m, m.count)) {
      if (m.fibers[t].state == State::ready) {
        if (!rests[t / kWarp]) resume(m, t);
        moved = true;
      }
      alive |= m.fibers[t].state != State::done;
    }
    if (!alive) return;
    if (!release_exchanges(m) && !moved && !release_barrier(m)) {
      die("deadlock: threads wait at different barriers, or for a lane that has ended");
    }
  }
}

}  // namespace

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  Machine& m = machine();
  const unsigned threads = block.x * block.y * block.z, blocks = grid.x * grid.y * grid.z;
  if (threads == 0 || threads > kMostThreads || blocks == 0 || shared_bytes > (228u << 10)) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  m.count = threads;
  m.body = &thread;
  m.random = options.seed;
  grid_size = grid;
  block_size = block;
  for (unsigned b : order(m, blocks)) {
    block_index = {b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)};
    m.shared.assign(shared_bytes, static_cast<char>(0xA5));
    run_block(m, block);
  }
}

void sync_block() { wait(State::at_barrier); }

unsigned lane() { return machine().current % kWarp; }

const uint64_t* exchange(unsigned mask, uint64_t value) {
  Machine& m = machine();
  Fiber& fiber = m.fibers[m.current];
  if ((mask >> lane() & 1u) == 0) die("a lane outside the mask of its own shuffle or vote");
  fiber.mask = mask;
  fiber.value = value;
  wait(State::at_exchange);
  return fiber.seen;
}

void* dynamic_shared() { return machine().shared.data(); }

}  // namespace cuda_host

__nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 0x3FF;
  float value = exponent == 0    ? ldexpf(static_cast<float>(mantissa), -24)
                : exponent == 31 ? (mantissa != 0 ? NAN : INFINITY)
                                 : ldexpf(static_cast<float>(mantissa + 1024), exponent - 25);
  return (x.bits & 0x8000) != 0 ? -value : value;
}

__half __float2half_rn(float x) {
  const uint16_t sign = static_cast<uint16_t>(__float_as_uint(x) >> 16 & 0x8000);
  const float size = fabsf(x);
  if (x != x) return {0x7FFF};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7C00)};
  int exponent;
  frexpf(size, &exponent);  // size = [1/2, 1) 2^exponent
  // Units of the last place: 2^(exponent - 11) for normal numbers, 2^-24 for subnormal ones; nearbyint rounds to even.
  const int unit = exponent - 11 > -24 ? exponent - 11 : -24;
  const uint32_t steps = static_cast<uint32_t>(nearbyintf(ldexpf(size, -unit)));
  // A carry out of the mantissa runs on into the exponent, as it should.
  const uint32_t base = size == 0 ? 0 : static_cast<uint32_t>(unit + 24) << 10;
  return {static_cast<uint16_t>(sign | (base + steps))};
}

cudaError_t cudaGetLastError() { return std::exchange(cuda_host::last_error, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "an error"; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = cuda_host::options.multiprocessors;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, void*) {
  memset(data, value, bytes);
  return cudaSuccess;
}
