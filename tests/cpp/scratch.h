// Scratch memory of the CUDA launchers as a caller gives it: poisoned, tickets zero before and after.
#pragma once
#include <string>

#include "check.h"
#include "tensors.h"

namespace vaeops::test {

struct ScratchMemory {
  std::vector<double> partials;
  std::vector<uint32_t> tickets = std::vector<uint32_t>(cuda::kTickets, 0);

  void check(const std::string& name) const {
    for (uint32_t t : tickets) CHECK(t == 0, "a ticket was left at %u: %s", t, name.c_str());
  }
  cuda::Scratch scratch(int64_t bytes) {
    CHECK(bytes % 8 == 0, "scratch of %lld bytes", static_cast<long long>(bytes));
    partials.assign(static_cast<size_t>(bytes / 8), NAN);
    return {partials.empty() ? nullptr : partials.data(), tickets.data()};
  }
};

}  // namespace vaeops::test
