// The tests' harness: CHECK counts failures and goes on; main returns their number.
#pragma once
#include <cstdio>

namespace vaeops::test {

inline int failures = 0;
inline int checks = 0;

#define CHECK(condition, ...)                                                \
  do {                                                                       \
    ++vaeops::test::checks;                                                  \
    if (!(condition)) {                                                      \
      if (++vaeops::test::failures <= 20) {                                  \
        std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
        std::fprintf(stderr, __VA_ARGS__);                                   \
        std::fprintf(stderr, "\n");                                          \
      }                                                                      \
    }                                                                        \
  } while (false)

inline int report() {
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace vaeops::test
