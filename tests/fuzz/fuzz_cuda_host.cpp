// The CUDA kernels' sources on the CPU: any shape, layout, dtype and option must agree with fp64, and be the same bits
// in any order of threads.
#include "decode.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  vaeops::test::check_case(vaeops::test::decode(data, size));
  if (vaeops::test::failures > 0) std::abort();
  return 0;
}
