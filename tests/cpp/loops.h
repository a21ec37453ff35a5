// How a test runs a call: its tasks in some order, on each instruction set that the machine has.
#pragma once
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "vaeops.h"

namespace vaeops::test {

inline void serially(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) { body(context, 0, n); }
// Uneven ranges, the last one first.
inline void backwards(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
  const int64_t cut = n / 3;
  if (cut < n) body(context, cut, n);
  if (cut > 0) body(context, 0, cut);
}
inline void on_threads(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < 3; ++i) {
    if (n * i / 3 < n * (i + 1) / 3) threads.emplace_back(body, context, n * i / 3, n * (i + 1) / 3);
  }
  for (std::thread& thread : threads) thread.join();
}

inline void for_each_isa(const std::function<void(const std::string&)>& run) {
  for (cpu::Isa isa : {cpu::Isa::scalar, cpu::Isa::avx2, cpu::Isa::avx512, cpu::Isa::amx}) {
    if (cpu::set_isa(isa)) run("ISA " + std::to_string(static_cast<int>(isa)));
  }
  cpu::set_isa(cpu::best_isa());
}

}  // namespace vaeops::test
